"""Chat templates: translates Go's language into Jinja."""
