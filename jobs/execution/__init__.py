"""The worker: runs jobs, and reports what they do."""
