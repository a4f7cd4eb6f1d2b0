"""WebSockets, and the live messages that they send."""
