"""What runs models. Only the processes of an engine load its library; the gateway calls them through a client."""
