"""The worker: runs jobs, and writes their reports and outcomes."""
