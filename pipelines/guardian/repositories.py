"""Registered repositories: their table, and how they are created, changed, deleted and found."""

import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Self
from uuid import uuid4

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from sqlalchemy import String, Text, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from cluster import secrets
from cluster.db import Base, now
from cluster.errors import Conflict, NotFound, UnprocessableRequest
from cluster.ownership import Principal
from cluster.sealing import SealedSecret, contains_secrets
from cluster.settings import get_settings
from jobs import schedules
from jobs.registry import find_kind
from jobs.retention import keep_jobs_in
from jobs.schedules import ScheduleRequest
from jobs.states import FINISHED
from jobs.tables import Job
from pipelines.guardian.git.urls import RemoteRepository, validate_url
from pipelines.guardian.policy import Policy
from pipelines.training.data.parsing import first_error_message
from pipelines.training.spec import ModelName

RETRAIN_KIND = "retrain"
"""The kind of job that retrains the model of a repository."""
WATCH_ALL_KIND = "watch_repositories"
RESERVED = {"name", "suffix", "data", "validation", "method"}
"""Fields of a training that the repository determines."""

BRANCH = r"^[^\s~^:?*\[\\\x00-\x20\x7f]{1,200}$"
BAD_BRANCH = re.compile(r"[-/]|.*(\.\.|//|@\{|/\.|[/.]$|\.lock$)")


def _validate_branch(name: str) -> str:
    if BAD_BRANCH.match(name):
        raise ValueError("is not the name of a branch")
    return name


BranchName = Annotated[str, Field(pattern=BRANCH), AfterValidator(_validate_branch)]


class RepositoryNotFound(NotFound):
    """There is no such repository."""

    code = "REPOSITORY_NOT_FOUND"


class RepositoryNameTaken(Conflict):
    """There is already a repository of this name."""

    code = "REPOSITORY_NAME_TAKEN"


class RepositoryInUse(Conflict):
    """A retraining uses this repository."""

    code = "REPOSITORY_IN_USE"


class Credentials(BaseModel):
    """The credentials of a remote repository. They are stored encrypted and never returned."""

    model_config = ConfigDict(extra="forbid", strict=True)

    username: str | None = Field(default=None, pattern=r"^[^:\x00-\x1f\x7f]{1,200}$", description="Null: git.")
    token: str = Field(pattern=r"^[^\x00-\x1f\x7f]{1,4000}$", description="A token, or a password.")


Secret = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{16,200}$")]


class RepositoryRequest(BaseModel):
    """A repository to watch, and how to train its model."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: ModelName
    path: str | None = Field(
        default=None, max_length=1000, description="A folder in guardian.roots. Either path or url."
    )
    url: str | None = Field(default=None, max_length=1000, examples=["https://git.example.com/ada/handbook.git"])
    branch: BranchName | None = Field(
        default=None, description="Null: the one that is checked out, or the default branch of a remote repository."
    )
    model: ModelName | None = Field(default=None, description="The name of the model. Null: as the repository.")
    training: dict[str, Any] = Field(
        default_factory=dict, description="Fields of a fine_tune spec, without name, suffix, data, validation, method."
    )
    policy: Policy = Policy()
    auto_deploy: bool = Field(default=True, description="Serve the new model, if it is better.")
    enabled: bool = Field(default=True, description="Whether it is checked on a schedule.")
    credentials: Credentials | None = Field(default=None, description="For its url. They are never returned.")
    webhook_secret: Secret | None = Field(default=None, description="Signs its webhooks. It is never returned.")

    @model_validator(mode="after")
    def validate_location(self) -> Self:
        if (self.path is None) == (self.url is None):
            raise ValueError("give either path or url")
        if self.credentials is not None and (self.url is None or not self.url.startswith("http")):
            raise ValueError("credentials need a url with https:// or http://")
        return self


class Repository(Base):
    __tablename__ = "repositories"

    id: Mapped[str] = mapped_column(String(40), primary_key=True, default=lambda: f"repo_{uuid4().hex}")
    name: Mapped[str] = mapped_column(String(100), unique=True)
    path: Mapped[str | None] = mapped_column(Text)  # a folder of this machine, with links resolved; None: it has a url
    url: Mapped[str | None] = mapped_column(Text)
    branch: Mapped[str | None] = mapped_column(String(200))  # None: the one checked out, or the remote's default
    model: Mapped[str] = mapped_column(String(100))  # the name of its model
    training: Mapped[dict[str, Any]]  # fields of a FineTuneSpec, without those of RESERVED
    policy: Mapped[dict[str, Any]]
    auto_deploy: Mapped[bool] = mapped_column(default=True)
    enabled: Mapped[bool] = mapped_column(default=True)
    credentials: Mapped[str | None] = mapped_column(Text)  # encrypted
    webhook_secret: Mapped[str | None] = mapped_column(Text)  # encrypted

    seen_commit: Mapped[str | None] = mapped_column(String(40))  # the tip at the last check
    checked_at: Mapped[datetime | None]
    check_error: Mapped[str | None] = mapped_column(Text)  # why the last check failed
    trained_commit: Mapped[str | None] = mapped_column(String(40))  # of the last plan that succeeded
    trained_at: Mapped[datetime | None]
    trained_job_id: Mapped[str | None] = mapped_column(String(40))
    tried_commit: Mapped[str | None] = mapped_column(String(40))  # of the last plan, whether or not it succeeded
    tried_job_id: Mapped[str | None] = mapped_column(String(40))

    created_by: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(default=now)
    updated_at: Mapped[datetime] = mapped_column(default=now, onupdate=now)


def _describe_credentials(row: Repository) -> SealedSecret:
    return SealedSecret(
        f"the credentials of the repository '{row.name}'", f"PATCH /api/v1/repos/{row.name} with credentials"
    )


def _describe_webhook(row: Repository) -> SealedSecret:
    return SealedSecret(
        f"the webhook's secret of the repository '{row.name}'", f"PATCH /api/v1/repos/{row.name} with webhook_secret"
    )


keep_jobs_in(Repository.trained_job_id, Repository.tried_job_id)
contains_secrets(Repository.credentials, _describe_credentials)
contains_secrets(Repository.webhook_secret, _describe_webhook)


async def create(session: AsyncSession, request: RepositoryRequest, principal: Principal) -> Repository:
    """Register a repository, and ensure the schedule that watches repositories. The caller has checked the path."""
    repository = Repository(created_by=principal.name, **_columns(request))
    session.add(repository)
    await _flush(session, request.name)
    cron = get_settings().guardian.watch_cron
    await schedules.ensure(session, ScheduleRequest(name="watch-repositories", kind=WATCH_ALL_KIND, cron=cron))
    return repository


async def change(session: AsyncSession, repository: Repository, changes: Mapping[str, Any]) -> None:
    """Set these fields. Raises UnprocessableRequest if the repository would not be valid."""
    request = merge_changes(repository, changes)
    columns = _columns(request)
    if request.url == repository.url and "credentials" not in changes:
        del columns["credentials"]  # with another url they are removed
    if "webhook_secret" not in changes:
        del columns["webhook_secret"]
    moved = (request.path, request.url, request.branch) != (repository.path, repository.url, repository.branch)
    for name, value in columns.items():
        setattr(repository, name, value)
    if moved:
        repository.seen_commit = repository.checked_at = repository.check_error = None
    await _flush(session, request.name)


def merge_changes(repository: Repository, changes: Mapping[str, Any]) -> RepositoryRequest:
    """The request that the repository would have with these changes."""
    secret = {"credentials", "webhook_secret"}
    before = {name: getattr(repository, name) for name in RepositoryRequest.model_fields.keys() - secret}
    values = {**before, **changes}
    for key, other in (("path", "url"), ("url", "path")):
        if changes.get(key) is not None and other not in changes:
            values[other] = None
    try:
        return RepositoryRequest.model_validate(values)
    except ValidationError as error:
        raise UnprocessableRequest(f"The repository would not be valid: {first_error_message(error)}.") from None


async def delete(session: AsyncSession, repository: Repository) -> None:
    """Delete a repository. Its datasets and models stay."""
    if plan := await unfinished_plan(session, repository.id):
        raise RepositoryInUse(f"The job {plan.id} uses '{repository.name}': cancel it first.")
    await session.delete(repository)


async def find(session: AsyncSession, id_or_name: str, *, lock: bool = False) -> Repository:
    named = select(Repository).where((Repository.id == id_or_name) | (Repository.name == id_or_name))
    # A name may look like the id of another repository: the id wins.
    ordered = named.order_by((Repository.id == id_or_name).desc()).limit(1)
    repository = await session.scalar(ordered.with_for_update() if lock else ordered)
    if repository is None:
        raise RepositoryNotFound(f"There is no repository '{id_or_name}'.")
    return repository


async def find_by_path(session: AsyncSession, path: Path) -> Repository | None:
    """The repository in this folder. If there are several, the first one that was registered."""
    query = select(Repository).where(Repository.path == str(path))
    return await session.scalar(query.order_by(Repository.created_at, Repository.id).limit(1))


def to_remote(repository: Repository) -> RemoteRepository:
    """The address of a remote repository, with its decrypted credentials."""
    assert repository.url is not None
    if repository.credentials is None:
        return RemoteRepository(repository.url, repository.branch)
    credentials = Credentials.model_validate_json(secrets.unseal(repository.credentials))
    return RemoteRepository(repository.url, repository.branch, credentials.username, credentials.token)


async def unfinished_plan(session: AsyncSession, repository_id: str) -> Job | None:
    """The job that retrains the model of this repository now, if there is one."""
    query = select(Job).where(Job.kind == RETRAIN_KIND, Job.state.not_in(FINISHED))
    filtered = query.where(Job.spec["repository_id"].as_string() == repository_id)
    return await session.scalar(filtered.order_by(Job.created_at).limit(1))


def _columns(request: RepositoryRequest) -> dict[str, Any]:
    """The columns of a request. Raises an error if its url or training is not valid."""
    if request.url is not None:
        validate_url(request.url)
    credentials, secret = request.credentials, request.webhook_secret
    return {
        **request.model_dump(exclude={"policy", "credentials", "webhook_secret"}),
        "model": request.model or request.name,
        "training": _validate_training(request),
        "policy": request.policy.model_dump(mode="json"),
        "credentials": None if credentials is None else secrets.seal(credentials.model_dump_json()),
        "webhook_secret": None if secret is None else secrets.seal(secret),
    }


def _validate_training(request: RepositoryRequest) -> dict[str, Any]:
    """The training as it was given: presets and defaults are applied by each plan, because they may change."""
    if reserved := sorted(RESERVED & request.training.keys()):
        raise UnprocessableRequest(f"training must not set {', '.join(reserved)}: the repository determines it.")
    find_kind("fine_tune").validate_spec(
        {**request.training, "name": request.model or request.name, "data": {"dataset": "its-own"}}
    )
    return request.training


async def _flush(session: AsyncSession, name: str) -> None:
    try:
        await session.flush()
    except IntegrityError as error:
        raise RepositoryNameTaken(f"There is already a repository named '{name}'.") from error
