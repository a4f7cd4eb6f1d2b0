"""The processes of an installation: how `forgearr up` starts, watches and stops them."""
