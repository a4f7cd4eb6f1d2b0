"""The API of jobs and schedules."""
