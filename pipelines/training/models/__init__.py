"""Models: base models, registered versions, their files."""
