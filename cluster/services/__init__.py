"""Outside services, such as Sonarr or Plex: their types, their connections, calls to them, and health checks."""
