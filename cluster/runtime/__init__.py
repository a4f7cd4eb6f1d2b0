"""What `forgearr up` starts, watches and ends."""
