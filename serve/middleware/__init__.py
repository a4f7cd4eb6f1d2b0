"""ASGI middleware around the application."""
