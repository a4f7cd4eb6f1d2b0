"""The API of training data, sessions and workers."""
