"""The durable queue: stores, schedules, runs and resumes jobs. It knows no HTTP, no models and no media."""
