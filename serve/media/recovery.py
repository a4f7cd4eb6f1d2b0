"""The routes /api/v1/recovery: recoveries of failed and stuck downloads, and their policy."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import func, select

from cluster.db import get_database
from cluster.times import UtcTime
from jobs import queue
from jobs.queue import JobRequest
from pipelines.media.downloads import log as recovery_log
from pipelines.media.downloads.cases import RECOVER_KIND
from pipelines.media.downloads.log import Recovery, RecoveryOutcome, RecoveryPolicyOverride
from pipelines.media.downloads.policy import RecoveryPolicy, Verdict
from pipelines.media.downloads.tables import DownloadState, FollowedDownload
from serve.http.pagination import Page, PaginationParams
from serve.security.callers import AdminCaller, CurrentCaller

router = APIRouter(prefix="/api/v1/recovery")

ServiceName = Annotated[str, Query(min_length=1, max_length=300)]


class RecoveryView(BaseModel):
    id: int
    at: UtcTime
    service: str
    item: str = Field(description="Id in the service; of a leftover folder, its path.")
    title: str
    content: list[str] = Field(description="The content that it should provide, such as episode:12.")
    decision: Verdict
    reason: str
    policy: dict[str, Any] = Field(description="The policy at that time.")
    dry_run: bool
    outcome: RecoveryOutcome
    searched: bool = Field(description="Whether another release was searched for.")
    new_item: str | None = Field(description="Id of the download after a retry.")
    error: str | None
    ended_at: UtcTime | None
    recovered_at: UtcTime | None = Field(description="When the content was available after all.")
    job_id: str


class DownloadView(BaseModel):
    """A download as one service sees it."""

    service_id: int
    item: str
    download_id: str | None
    title: str
    state: DownloadState
    reason: str
    tags: list[str]
    bytes_left: int | None
    strikes: int = Field(description="Consecutive polls without the expected progress.")
    moved_at: UtcTime
    ended_at: UtcTime | None
    settled: bool = Field(description="Whether no more decision is needed.")
    decide_at: UtcTime | None = Field(description="Earliest time of the next decision.")


class PolicyView(BaseModel):
    policy: RecoveryPolicy
    changed_by: str | None = Field(description="Null: the policy is that of the settings.")
    changed_at: UtcTime | None


class RunRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    dry_run: bool | None = Field(default=None, description="Record decisions without acting. Null: as the policy says.")


class RecoveryAccepted(BaseModel):
    job_id: str


@router.get("")
async def list_recoveries(
    caller: CurrentCaller,
    paging: PaginationParams,
    service: ServiceName | SkipJsonSchema[None] = None,
    item: Annotated[str, Query(min_length=1, max_length=4000)] | SkipJsonSchema[None] = None,
    decision: Verdict | SkipJsonSchema[None] = None,
    outcome: RecoveryOutcome | SkipJsonSchema[None] = None,
    dry_run: bool | SkipJsonSchema[None] = None,
) -> Page[RecoveryView]:
    """List the decisions with their reasons, the newest first."""
    query = select(Recovery)
    for column, value in (
        (Recovery.item, item),
        (Recovery.decision, decision),
        (Recovery.outcome, outcome),
        (Recovery.dry_run, dry_run),
    ):
        if value is not None:
            query = query.where(column == value)
    if service is not None:
        query = query.where(func.lower(Recovery.service) == service.lower())
    async with get_database().read_transaction() as session:
        rows = await paging.read(session, query.order_by(Recovery.id.desc()))
        return paging.page([RecoveryView.model_validate(row, from_attributes=True) for row in rows.items], rows.total)


@router.get("/downloads")
async def list_followed_downloads(
    caller: CurrentCaller, paging: PaginationParams, state: DownloadState | SkipJsonSchema[None] = None
) -> Page[DownloadView]:
    """List the downloads that are followed, with their strikes. Finished downloads come last."""
    query = select(FollowedDownload)
    if state is not None:
        query = query.where(FollowedDownload.state == state)
    ordered = query.order_by(FollowedDownload.ended_at.is_not(None), FollowedDownload.id.desc())
    async with get_database().read_transaction() as session:
        rows = await paging.read(session, ordered)
        return paging.page([DownloadView.model_validate(row, from_attributes=True) for row in rows.items], rows.total)


@router.get("/policy")
async def show_policy(caller: CurrentCaller) -> PolicyView:
    """Get the policy in force: the settings `recovery.*`, or the one that an administrator has set."""
    async with get_database().read_transaction() as session:
        return _policy_view(*await recovery_log.current_policy(session))


@router.put("/policy")
async def replace_policy(body: RecoveryPolicy, caller: AdminCaller) -> PolicyView:
    """Replace the whole policy. Downloads on which the old policy did not act are decided again."""
    async with get_database().transaction() as session:
        return _policy_view(body, await recovery_log.set_policy(session, body, caller.name))


@router.delete("/policy", status_code=204)
async def forget_policy(caller: AdminCaller) -> None:
    """Return to the policy of the settings."""
    async with get_database().transaction() as session:
        await recovery_log.reset_policy(session)


@router.post("/run", status_code=202)
async def run_recovery(
    body: RunRequest,
    caller: AdminCaller,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200)] = None,
) -> RecoveryAccepted:
    """Decide about failed and stuck downloads now, and act, unless it is a dry run."""
    job_request = JobRequest(kind=RECOVER_KIND, spec=body.model_dump())
    async with get_database().transaction() as session:
        job = await queue.enqueue(session, job_request, caller, idempotency_key=idempotency_key, unless_queued=True)
        return RecoveryAccepted(job_id=job.id)


def _policy_view(policy: RecoveryPolicy, stored: RecoveryPolicyOverride | None) -> PolicyView:
    return PolicyView(policy=policy, changed_by=stored and stored.changed_by, changed_at=stored and stored.changed_at)
