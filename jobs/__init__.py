"""The durable queue: keeps, schedules, runs and resumes work. It knows no HTTP, no models and no media."""
