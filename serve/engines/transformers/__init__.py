"""Model folders on transformers, with continuous batching."""
