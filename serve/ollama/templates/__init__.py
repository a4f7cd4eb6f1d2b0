"""Chat templates in Go's language and in Jinja."""
