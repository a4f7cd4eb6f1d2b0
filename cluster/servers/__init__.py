"""Servers: what the machines of the settings are doing. Each is measured once, for all replicas of the gateway."""
