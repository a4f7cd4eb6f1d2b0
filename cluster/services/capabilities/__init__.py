"""What a connector can offer: downloads, libraries, collections, settings."""
