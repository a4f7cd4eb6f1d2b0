"""The tables of the queue: jobs, their dependencies and journal, idempotency keys, schedules, deletions, leadership."""

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index, Integer, String, Text, text
from sqlalchemy.orm import Mapped, mapped_column

from cluster.db import Base, Document, Sequence, now

UNFINISHED = "parent_id IS NULL AND state IN ('queued', 'running', 'paused')"
"""What counts as an unfinished job of an account: its own jobs, not their children. As text, without parameters,
because SQLite uses the index below only for queries that contain its condition."""


class Job(Base):
    __tablename__ = "jobs"
    __table_args__ = (
        Index(
            "ix_jobs_runnable",
            "demand",
            text("priority DESC"),
            "created_at",
            sqlite_where=text("state = 'queued' AND unfinished_dependencies = 0 AND delayed = 0"),
            postgresql_where=text("state = 'queued' AND unfinished_dependencies = 0 AND NOT delayed"),
        ),
        Index(
            "ix_jobs_limited",
            "kind",
            sqlite_where=text("state = 'running' AND concurrency IS NOT NULL"),
            postgresql_where=text("state = 'running' AND concurrency IS NOT NULL"),
        ),
        Index(
            "ix_jobs_worker",
            "worker",
            sqlite_where=text("state = 'running'"),
            postgresql_where=text("state = 'running'"),
        ),
        Index(
            "ix_jobs_run_after",
            "run_after",
            sqlite_where=text("state = 'queued' AND delayed = 1"),
            postgresql_where=text("state = 'queued' AND delayed"),
        ),
        Index(
            "ix_jobs_unfinished",
            "owner_id",
            sqlite_where=text(f"owner_id IS NOT NULL AND {UNFINISHED}"),
            postgresql_where=text(f"owner_id IS NOT NULL AND {UNFINISHED}"),
        ),
        Index("ix_jobs_kind_state_finished_at", "kind", "state", "finished_at"),  # also for /metrics and retention
        Index("ix_jobs_owner_id_created_at", "owner_id", "created_at"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    kind: Mapped[str] = mapped_column(String(100))
    spec: Mapped[dict[str, Any]]

    state: Mapped[str] = mapped_column(String(12))
    phase: Mapped[str | None] = mapped_column(Text)
    progress: Mapped[float] = mapped_column(default=0.0)
    priority: Mapped[int] = mapped_column(default=0)  # higher ones run first
    run_after: Mapped[datetime]
    delayed: Mapped[bool] = mapped_column(default=False)  # run_after was in the future in the dispatcher's last round
    unfinished_dependencies: Mapped[int] = mapped_column(default=0)
    control: Mapped[str | None] = mapped_column(String(12))  # the request to a running job

    resources: Mapped[dict[str, Any]]
    demand: Mapped[str] = mapped_column(Text)  # resources as one comparable text; empty for a light job
    concurrency: Mapped[int | None]  # how many of this kind may run at the same time
    time_limit: Mapped[float | None]  # seconds that one attempt may take
    stall_limit: Mapped[float | None]  # seconds without a report, checkpoint or log

    attempt: Mapped[int] = mapped_column(default=0)  # the current one; a lost worker does not use one up
    max_attempts: Mapped[int]
    losses: Mapped[int] = mapped_column(default=0)  # how often its worker was lost since it last got further
    lost_checkpoint: Mapped[str | None] = mapped_column(String(64))  # the digest of its checkpoint at the last loss

    worker: Mapped[str | None] = mapped_column(String(60))
    lease_token: Mapped[str | None] = mapped_column(String(40))  # every write of a worker must contain it
    heartbeats: Mapped[int] = mapped_column(default=0)  # of this lease

    checkpoint: Mapped[Any | None] = mapped_column(Document)  # the state from which the function continues
    result: Mapped[Any | None] = mapped_column(Document)
    error: Mapped[Any | None] = mapped_column(Document)  # {code, message}

    tracked: Mapped[bool] = mapped_column(default=False)  # whether it is a run in MLflow
    mlflow_run_id: Mapped[str | None] = mapped_column(String(40))

    parent_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"), index=True)
    child_name: Mapped[str | None] = mapped_column(Text)  # its name within its parent
    owner_id: Mapped[str | None] = mapped_column(String(36))  # None: the platform, or this machine's user
    created_by: Mapped[str] = mapped_column(String(200))

    created_at: Mapped[datetime] = mapped_column(default=now, index=True)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    updated_at: Mapped[datetime] = mapped_column(default=now, onupdate=now)


class JobDependency(Base):
    """`job_id` starts only when `depends_on_id` has succeeded."""

    __tablename__ = "job_dependencies"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    depends_on_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True, index=True)


class JobEvent(Base):
    """An entry of the journal, ordered by `id`: a state change, progress, a checkpoint, a log line or other event."""

    __tablename__ = "job_events"
    __table_args__ = (Index("ix_job_events_job_id_id", "job_id", "id"),)

    id: Mapped[int] = mapped_column(Sequence, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    type: Mapped[str] = mapped_column(String(40))
    data: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=now, index=True)


class IdempotencyKey(Base):
    """The job that a request with this key has created, so that a repeated request creates no second job."""

    __tablename__ = "idempotency_keys"

    owner: Mapped[str] = mapped_column(String(36), primary_key=True)
    key: Mapped[str] = mapped_column(String(200), primary_key=True)
    request_hash: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    expires_at: Mapped[datetime] = mapped_column(index=True)


class Schedule(Base):
    __tablename__ = "schedules"

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    kind: Mapped[str] = mapped_column(String(100))
    spec: Mapped[dict[str, Any]]
    cron: Mapped[str] = mapped_column(String(100))
    timezone: Mapped[str] = mapped_column(String(64))
    priority: Mapped[int] = mapped_column(default=0)
    enabled: Mapped[bool] = mapped_column(default=True)
    next_fire_at: Mapped[datetime | None] = mapped_column(index=True)
    last_fire_at: Mapped[datetime | None]
    last_job_id: Mapped[str | None] = mapped_column(String(40))
    owner_id: Mapped[str | None] = mapped_column(String(36))
    created_by: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(default=now)
    updated_at: Mapped[datetime] = mapped_column(default=now, onupdate=now)


class ScheduleTick(Base):
    """A fire time whose job was created. It is unique, so neither a crash nor a second dispatcher creates another."""

    __tablename__ = "schedule_ticks"

    schedule_id: Mapped[str] = mapped_column(ForeignKey("schedules.id", ondelete="CASCADE"), primary_key=True)
    fire_at: Mapped[datetime] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)


class DeletedJob(Base):
    """A deleted job whose files in storage, or whose run in MLflow, may still be there."""

    __tablename__ = "deleted_jobs"

    job_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    mlflow_run_id: Mapped[str | None] = mapped_column(String(40))  # None: it has none, or it stays


class Leadership(Base):
    """The dispatcher that may act. There is one row; a dispatcher that finds another token in it stops."""

    __tablename__ = "leadership"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    holder: Mapped[str] = mapped_column(String(200))
    token: Mapped[str] = mapped_column(String(40))
    heartbeats: Mapped[int] = mapped_column(default=0)
    renewed_at: Mapped[datetime] = mapped_column(default=now)  # by the leader's clock, for people only
    waiting: Mapped[dict[str, Any]]  # why jobs of a demand or a kind wait, for people
    tracked_until: Mapped[int] = mapped_column(Sequence, default=0)  # the last event that was sent to MLflow
