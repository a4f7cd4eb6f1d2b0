"""Outside services, such as Sonarr or Plex: which there are, how they are asked, and how they are."""
