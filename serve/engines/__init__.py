"""What runs models. Only the processes of an engine load its library; the gateway speaks to them through remote.py."""
