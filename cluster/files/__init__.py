"""Uploaded files: a row in the database, and the bytes in storage. And the space that is left on the disk."""
