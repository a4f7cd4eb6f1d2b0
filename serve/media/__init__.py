"""The APIs of shows, movies, downloads and audits."""
