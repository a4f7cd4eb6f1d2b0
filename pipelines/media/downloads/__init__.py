"""Downloads: polled, followed, and recovered when they fail."""
