"""The media stack: health checks of services, audits, downloads."""
