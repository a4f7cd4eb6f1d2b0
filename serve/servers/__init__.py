"""The routes of servers: what every machine is doing now."""
