"""Outside services, such as Sonarr or Plex: which there are, how they are called, and whether they are well."""
