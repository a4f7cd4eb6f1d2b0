"""What all routes share: errors, pagination, streams."""
