"""Uploaded files: a row in the database, and the bytes in storage."""
