"""Models of a remote Ollama server."""
