"""Read git repositories, as objects only."""
