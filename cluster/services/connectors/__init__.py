"""The connectors: a module for each type of service, which declares its `CONNECTOR`."""
