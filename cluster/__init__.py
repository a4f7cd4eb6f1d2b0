"""The base: settings, errors, database, storage, identity, logs, events, and the processes of an installation."""
