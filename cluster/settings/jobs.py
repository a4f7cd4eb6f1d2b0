"""Settings of the queue."""

from pydantic import Field

from cluster.settings.base import Section


class JobSettings(Section):
    modules: list[str] = Field(description="Modules that declare kinds of job.")
    workers: int = Field(ge=1, le=256, description="Warm worker processes for light jobs.")
    slots: int = Field(ge=1, le=256, description="Light jobs that one warm worker runs at a time.")
    lease_seconds: float = Field(
        ge=1, le=600, description="How long a worker may be silent before its jobs go to another one."
    )
    stop_grace_seconds: float = Field(
        ge=0.1, le=3600, description="How long a job may take to obey a cancel or its time limit."
    )
    max_losses: int = Field(
        ge=2,
        le=1000,
        description="How many times a job may lose its worker before it fails; the last time it had one of its own.",
    )
    retry_seconds: float = Field(ge=0, le=3600, description="Wait before the first retry; it doubles each time.")
    retry_cap_seconds: float = Field(ge=0, le=86400, description="Longest wait before a retry.")
    event_days: float = Field(gt=0, description="How long the events and logs of finished jobs are kept.")
    idempotency_hours: float = Field(gt=0, description="How long an idempotency key is remembered.")
