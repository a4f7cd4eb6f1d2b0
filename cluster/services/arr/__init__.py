"""What the connectors of Sonarr, Radarr and Prowlarr share."""
