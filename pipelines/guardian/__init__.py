"""Watches git repositories, and retrains their models."""
