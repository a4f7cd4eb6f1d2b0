"""Authentication, protection against other origins, and rate limits of requests."""
