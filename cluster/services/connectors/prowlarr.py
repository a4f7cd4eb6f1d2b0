"""Prowlarr: the indexers that the others search."""

from cluster.services import arr

CONNECTOR = arr.connector("prowlarr", "Prowlarr", "/api/v1", "indexers", "search", "history", "configure")
