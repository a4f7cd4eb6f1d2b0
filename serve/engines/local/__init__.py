"""An engine in this process: a pool of loaded models."""
