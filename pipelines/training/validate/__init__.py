"""The kind `validate`: measure a version against its gates."""
