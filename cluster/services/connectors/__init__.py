"""One module for each sort of service, which declares its `CONNECTOR`."""
