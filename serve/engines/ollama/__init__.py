"""Models of a remote Ollama."""
