"""The API of fine-tuning, validation and deployment."""
