"""Commands that use the database and `FORGEARR_HOME` directly, so that no server has to run."""
