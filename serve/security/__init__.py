"""Credentials, origins and rate limits of requests."""
