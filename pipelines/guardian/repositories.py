"""Registered repositories: the folders and addresses that are watched, and the models that are made of them."""

from datetime import datetime
from typing import Any
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import String, Text, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from cluster import secrets
from cluster.db import Base, now
from cluster.errors import NotFound
from pipelines.guardian.addresses import Remote


class RepositoryNotFound(NotFound):
    """There is no such repository."""

    code = "REPOSITORY_NOT_FOUND"


class Credentials(BaseModel):
    """What a remote repository asks for. They are kept sealed, and never told."""

    model_config = ConfigDict(extra="forbid", strict=True)

    username: str | None = Field(default=None, pattern=r"^[^:\x00-\x1f\x7f]{1,200}$", description="Null: git.")
    token: str = Field(pattern=r"^[^\x00-\x1f\x7f]{1,4000}$", description="A token, or a password.")


class Repository(Base):
    __tablename__ = "repositories"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    path: Mapped[str | None] = mapped_column(Text)  # a folder of this machine, all links resolved; or else:
    url: Mapped[str | None] = mapped_column(Text)
    branch: Mapped[str | None] = mapped_column(String(200))  # None: the one that is checked out, or the remote's own
    model: Mapped[str] = mapped_column(String(100))  # the name of the model that is made of it
    training: Mapped[dict[str, Any]]  # of a FineTuneSpec, all but its name and its data
    policy: Mapped[dict[str, Any]]
    auto_deploy: Mapped[bool] = mapped_column(default=True)
    enabled: Mapped[bool] = mapped_column(default=True)
    credentials: Mapped[str | None] = mapped_column(Text)  # sealed
    webhook_secret: Mapped[str | None] = mapped_column(Text)  # sealed

    seen_commit: Mapped[str | None] = mapped_column(String(40))  # the tip at the last look
    checked_at: Mapped[datetime | None]
    check_error: Mapped[str | None] = mapped_column(Text)  # why the last look saw nothing
    trained_commit: Mapped[str | None] = mapped_column(String(40))  # what the last plan that ended well learned from
    trained_at: Mapped[datetime | None]
    trained_job_id: Mapped[str | None] = mapped_column(String(40))
    tried_commit: Mapped[str | None] = mapped_column(String(40))  # what the last plan began with, whatever came of it
    tried_job_id: Mapped[str | None] = mapped_column(String(40))

    created_by: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(default=now)
    updated_at: Mapped[datetime] = mapped_column(default=now, onupdate=now)


async def find(session: AsyncSession, id_or_name: str, *, lock: bool = False) -> Repository:
    """The repository of this id or name."""
    named = select(Repository).where((Repository.id == id_or_name) | (Repository.name == id_or_name))
    # A name has no underscore behind "repo" unless somebody chose it so: the id goes first.
    ordered = named.order_by((Repository.id == id_or_name).desc()).limit(1)
    repository = await session.scalar(ordered.with_for_update() if lock else ordered)
    if repository is None:
        raise RepositoryNotFound(f"There is no repository '{id_or_name}'.")
    return repository


def remote_of(repository: Repository) -> Remote:
    """Where a repository with an address is fetched from."""
    assert repository.url is not None
    if repository.credentials is None:
        return Remote(repository.url, repository.branch)
    credentials = Credentials.model_validate_json(secrets.unseal(repository.credentials))
    return Remote(repository.url, repository.branch, credentials.username, credentials.token)


def new_id() -> str:
    return f"repo_{uuid4().hex}"
