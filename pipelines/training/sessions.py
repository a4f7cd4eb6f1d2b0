"""The gateway's training sessions: a wish to train that is kept before, and beside, the job that fulfils it."""

from datetime import datetime
from typing import Any
from uuid import uuid4

from sqlalchemy import ForeignKey, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from cluster.db import Base, now
from jobs.tables import Document


class TrainingSession(Base):
    __tablename__ = "training_sessions"

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=lambda: uuid4().hex)
    name: Mapped[str] = mapped_column(String(200))
    description: Mapped[str | None] = mapped_column(Text)
    base_model: Mapped[str] = mapped_column(String(300))
    config: Mapped[dict[str, Any]]
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"), index=True)  # None: not started
    prompt_ids: Mapped[Any | None] = mapped_column(Document)  # a list of integers
    worker_id: Mapped[int | None]
    owner_id: Mapped[str | None] = mapped_column(String(36), index=True)  # None: this machine's own
    created_by: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(default=now)
    updated_at: Mapped[datetime] = mapped_column(default=now, onupdate=now)
