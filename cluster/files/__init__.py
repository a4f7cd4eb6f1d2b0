"""Uploaded files, in storage with a row each."""
