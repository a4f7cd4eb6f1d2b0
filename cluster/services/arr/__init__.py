"""What Sonarr and its relatives have in common."""
