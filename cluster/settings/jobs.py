"""Settings of the queue, and of how long what it leaves behind is stored."""

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
        description="Number of times in a row that a job that is alone on its worker may lose it without a new "
        "checkpoint. Then it fails. After as many losses of shared workers, a light job gets a worker of its own.",
    )
    retry_seconds: float = Field(ge=0, le=3600, description="Delay before the first retry. It doubles with each retry.")
    retry_cap_seconds: float = Field(ge=0, le=86400, description="Longest delay before a retry.")
    event_days: float = Field(gt=0, description="How long the events and logs of finished jobs are stored.")
    idempotency_hours: float = Field(gt=0, description="How long an idempotency key is valid.")


class RetentionSettings(Section):
    job_days: float | None = Field(
        gt=0,
        description="How long finished jobs are stored, with their children, events and files. Jobs that something "
        "still refers to stay. Null: for ever.",
    )
    routine_hours: float | None = Field(
        gt=0,
        description="How long the routine jobs of Forgearr's own schedules (checks, watches, sweeps) are stored after "
        "they succeeded. Null: as long as others.",
    )
    training_days: float | None = Field(
        gt=0,
        description="How long a training that succeeded is stored, with its model, when no model version and no "
        "session refers to it. Null: for ever.",
    )
    session_days: float | None = Field(
        gt=0,
        description="How long training sessions are stored after their last change and the end of their training. "
        "Null: for ever.",
    )
    batch_days: float | None = Field(
        gt=0, description="How long finished batches are stored, with their output files. Null: for ever."
    )
    mlflow_runs: bool = Field(description="Whether the run of a job in MLflow is deleted with the job.")
