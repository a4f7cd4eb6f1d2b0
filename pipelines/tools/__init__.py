"""Calls of tools, recorded."""
