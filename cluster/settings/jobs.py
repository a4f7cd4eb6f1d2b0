"""Settings of the queue."""

from pydantic import Field

from cluster.settings.base import Section


class JobSettings(Section):
    modules: list[str] = Field(description="Modules that declare kinds of job.")
    workers: int = Field(ge=1, le=256, description="Warm worker processes for light jobs.")
    slots: int = Field(ge=1, le=256, description="Light jobs that one warm worker runs at a time.")
    lease_seconds: float = Field(
        ge=1, le=600, description="Time without a heartbeat after which the jobs of a worker go to another one."
    )
    stop_grace_seconds: float = Field(
        ge=0.1, le=3600, description="Time that a job gets to stop after a cancel or its time limit."
    )
    max_losses: int = Field(
        ge=2,
        le=1000,
        description="Number of lost workers after which a job fails. For its last try, a light job gets a worker of "
        "its own.",
    )
    retry_seconds: float = Field(ge=0, le=3600, description="Delay before the first retry. It doubles with each retry.")
    retry_cap_seconds: float = Field(ge=0, le=86400, description="Longest delay before a retry.")
    event_days: float = Field(gt=0, description="How long the events and logs of finished jobs are stored.")
    idempotency_hours: float = Field(gt=0, description="How long an idempotency key is valid.")
