"""The engines, which run models. Only an engine's processes load its library; the gateway calls them by a client."""
