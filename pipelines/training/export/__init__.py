"""The kind `export`: a trained model as GGUF files."""
