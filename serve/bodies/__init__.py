"""What doors with many fields take and answer, where that is too much for the module of the door itself."""
