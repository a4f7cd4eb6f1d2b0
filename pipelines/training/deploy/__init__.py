"""The kind `deploy`: serve a version of a model."""
