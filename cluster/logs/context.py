"""Context variables with the request, its client's address, and the job that a log line belongs to."""

from contextvars import ContextVar

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
request_address: ContextVar[str | None] = ContextVar("request_address", default=None)
job_id: ContextVar[str | None] = ContextVar("job_id", default=None)
