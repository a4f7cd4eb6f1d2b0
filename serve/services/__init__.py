"""The API of outside services and their tools."""
