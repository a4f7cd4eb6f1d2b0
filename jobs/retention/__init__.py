"""Retention: delete finished jobs after a time, with all that belongs to them, unless something refers to them."""

from jobs.retention.cleanup import delete_remains
from jobs.retention.expired import delete_expired
from jobs.retention.references import FindNeeded, keep_jobs_in, register_references

__all__ = ["FindNeeded", "delete_expired", "delete_remains", "keep_jobs_in", "register_references"]
