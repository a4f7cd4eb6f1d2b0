"""Names of models: what they refer to, and the API of registered models."""
