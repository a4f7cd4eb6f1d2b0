"""From the name of a model to what answers for it, and the API of registered models."""
