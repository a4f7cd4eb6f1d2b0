"""The routes /api/v1/repos: git repositories that are watched, so that their models are retrained after changes."""

import asyncio
import shutil
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import select

from cluster import audit_log
from cluster.db import get_database
from cluster.times import UtcTime
from pipelines.guardian import repositories, watch_repo
from pipelines.guardian.git import locations
from pipelines.guardian.git import repo as git_repo
from pipelines.guardian.policy import Policy
from pipelines.guardian.repositories import BranchName, Credentials, Repository, RepositoryRequest, Secret
from pipelines.training.spec import ModelName
from serve.http.pagination import Page, PaginationParams
from serve.security.callers import AdminCaller

router = APIRouter(prefix="/api/v1/repos")

RepositoryName = Annotated[str, Field(max_length=100, description="Id or name of the repository.")]
FolderPath = Annotated[str, Field(min_length=1, max_length=1000)]


class RepositoryView(BaseModel):
    """A repository. Its credentials and its webhook secret are never shown."""

    id: str = Field(examples=["repo_0f3e5d0b6c1f4f0f9b7d6a5e4c3b2a19"])
    name: str
    path: str | None
    url: str | None
    branch: str | None
    model: str
    training: dict[str, Any]
    policy: Policy
    auto_deploy: bool
    enabled: bool
    has_credentials: bool
    has_webhook_secret: bool
    seen_commit: str | None = Field(description="The newest commit at the last check.")
    checked_at: UtcTime | None
    check_error: str | None = Field(description="Why the last check failed.")
    trained_commit: str | None = Field(description="The commit of the last training.")
    trained_at: UtcTime | None
    trained_job_id: str | None
    tried_commit: str | None = Field(description="The commit of the last plan, whatever its outcome.")
    tried_job_id: str | None
    created_by: str
    created_at: UtcTime
    updated_at: UtcTime


class RepositoryChanges(BaseModel):
    """Changes to a repository. Fields that are not sent stay unchanged. A policy is replaced as a whole."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: ModelName | SkipJsonSchema[None] = None
    path: str | None = Field(default=None, max_length=1000)
    url: str | None = Field(default=None, max_length=1000)
    branch: BranchName | None = None
    model: ModelName | SkipJsonSchema[None] = None
    training: dict[str, Any] | SkipJsonSchema[None] = None
    policy: Policy | SkipJsonSchema[None] = None
    auto_deploy: bool | SkipJsonSchema[None] = None
    enabled: bool | SkipJsonSchema[None] = None
    credentials: Credentials | None = Field(default=None, description="Null: delete them.")
    webhook_secret: Secret | None = Field(default=None, description="Null: delete it, and accept no more webhooks.")


class CheckAccepted(BaseModel):
    job_id: str = Field(description="The job that checks the repository.")


@router.post("", status_code=201)
async def register_repository(body: RepositoryRequest, caller: AdminCaller) -> RepositoryView:
    """Register a repository, and queue its first check. From then on it is watched."""
    if body.path is not None:
        folder = await asyncio.to_thread(git_repo.validate_path, body.path, body.branch)
        body = body.model_copy(update={"path": str(folder)})
    async with get_database().transaction() as session:
        repository = await repositories.create(session, body, caller)
        if repository.enabled:
            await watch_repo.enqueue_watch(session, repository, caller)
        return _view(repository)


@router.get("")
async def list_repositories(
    caller: AdminCaller,
    paging: PaginationParams,
    path: Annotated[FolderPath | SkipJsonSchema[None], Query(description="Only repositories in this folder.")] = None,
) -> Page[RepositoryView]:
    """List repositories by name."""
    query = select(Repository) if path is None else select(Repository).where(Repository.path == path)
    async with get_database().read_transaction() as session:
        rows = await paging.read(session, query.order_by(Repository.name))
        return paging.page([_view(repository) for repository in rows.items], rows.total)


@router.get("/{repository}")
async def show_repository(repository: RepositoryName, caller: AdminCaller) -> RepositoryView:
    async with get_database().read_transaction() as session:
        return _view(await repositories.find(session, repository))


@router.patch("/{repository}")
async def change_repository(
    repository: RepositoryName, changes: RepositoryChanges, caller: AdminCaller
) -> RepositoryView:
    """Change the fields that are sent. A new url deletes the credentials of the old one."""
    values = changes.model_dump(exclude_unset=True)
    async with get_database().read_transaction() as session:
        current = await repositories.find(session, repository)
    updated = repositories.merge_changes(current, values)
    if updated.path is not None and (updated.path, updated.branch) != (current.path, current.branch):
        values["path"] = str(await asyncio.to_thread(git_repo.validate_path, updated.path, updated.branch))
    async with get_database().transaction() as session:
        row = await repositories.find(session, current.id, lock=True)
        await repositories.change(session, row, values)
        return _view(row)


@router.delete("/{repository}", status_code=204)
async def delete_repository(repository: RepositoryName, caller: AdminCaller) -> None:
    """Delete a repository and its local mirror. Datasets and models that were created from it stay."""
    async with get_database().transaction() as session:
        row = await repositories.find(session, repository, lock=True)
        await repositories.delete(session, row)
        audit_log.record(session, "repository.delete", caller, row.name, id=row.id)
    await asyncio.to_thread(shutil.rmtree, locations.mirror_path(row.id), ignore_errors=True)


@router.post("/{repository}/check", status_code=202)
async def check_repository(
    repository: RepositoryName,
    caller: AdminCaller,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200)] = None,
) -> CheckAccepted:
    """Check a repository now, and retrain its model if the policy says so."""
    async with get_database().transaction() as session:
        row = await repositories.find(session, repository)
        job = await watch_repo.enqueue_watch(session, row, caller, idempotency_key=idempotency_key)
        return CheckAccepted(job_id=job.id)


def _view(repository: Repository) -> RepositoryView:
    values = {name: getattr(repository, name, None) for name in RepositoryView.model_fields}
    values["has_credentials"] = repository.credentials is not None
    values["has_webhook_secret"] = repository.webhook_secret is not None
    return RepositoryView.model_validate(values)
