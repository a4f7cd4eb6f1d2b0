"""The HTTP client of outside services."""
