"""Sonarr: series."""

from cluster.services import arr

CONNECTOR = arr.connector("sonarr", "Sonarr", "/api/v3", "queue", "history", "library", "add", "search", "configure")
