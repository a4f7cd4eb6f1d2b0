"""Radarr: movies."""

from cluster.services import arr

CONNECTOR = arr.connector("radarr", "Radarr", "/api/v3", "queue", "history", "library", "add", "search", "configure")
