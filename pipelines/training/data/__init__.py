"""Training data: datasets, prompts, samples."""
