"""Train models: data, fine-tuning, export, validation, deployment."""
