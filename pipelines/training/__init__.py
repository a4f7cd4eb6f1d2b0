"""The way of a model: data, training, export, validation, deployment."""
