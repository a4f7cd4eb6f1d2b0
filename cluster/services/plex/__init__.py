"""Plex's capabilities."""
