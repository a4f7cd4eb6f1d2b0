"""/api/v1/config: audits of the settings of services, what they recommend, and its application."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request, Response
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import get_database
from cluster.errors import InvalidRequest, Unavailable
from cluster.services import store as service_store
from cluster.services.store import ServiceNotFound
from jobs import queue
from jobs.queue import JobNotFound, JobRequest
from jobs.states import FINISHED, State
from pipelines.media.audit import audit_services, change_settings, rules
from pipelines.media.audit import tables as audit_tables
from pipelines.media.audit.audit_services import AuditSpec
from pipelines.media.audit.change_settings import ChangeSpec
from pipelines.media.audit.rules import PRIORITIES, Category, Priority
from pipelines.media.audit.tables import Audit, AuditNotFound, Recommendation
from serve.http.errors import ERROR_RESPONSES
from serve.http.job_wait import UNFINISHED, Wait, outcome_of
from serve.media.audit_schemas import (
    ApplyRequest,
    AuditHistory,
    AuditRequest,
    AuditView,
    ChangesView,
    PastAudit,
    RecommendationDetail,
    RecommendationPage,
    RecommendationView,
    RulesView,
    RuleView,
)
from serve.media.audit_views import (
    audit_view,
    by_severity,
    error_message,
    finished_audit_view,
    pagination_of,
    recommendation_fields,
    service_handles,
)
from serve.security.callers import AdminCaller, Caller, CurrentCaller, owner_of

router = APIRouter(prefix="/api/v1/config", tags=["Configuration"], responses=ERROR_RESPONSES)

ID_MAX = 2**63 - 1

PageNumber = Annotated[int, Query(ge=1, le=2**31 - 1, description="Counted from 1.")]
PageSize = Annotated[int, Query(ge=1, le=100)]
Word = Annotated[str | SkipJsonSchema[None], Query(min_length=1, max_length=100, description="Its type, or its name.")]
IdempotencyKey = Annotated[str | None, Header(min_length=1, max_length=200)]


class AuditFailed(Unavailable):
    """The audit has failed."""

    code = "AUDIT_FAILED"


class ChangeFailed(Unavailable):
    """The changes have failed; which of them were made is shown by their recommendations."""

    code = "CHANGE_FAILED"


@router.post("/audit", responses=UNFINISHED)
async def audit_configuration(
    wanted: AuditRequest,
    caller: AdminCaller,
    request: Request,
    response: Response,
    wait: Wait = 60,
    idempotency_key: IdempotencyKey = None,
) -> AuditView:
    """Audit the settings of services. One that cannot be reached is told of; the others are audited."""
    if not wanted.services:
        raise InvalidRequest("At least one service must be specified")
    spec = AuditSpec(services=list(dict.fromkeys(wanted.services)), include_web_search=wanted.include_web_search)
    async with get_database().transaction() as session:
        await audit_services.auditable(session, spec.services)
        asked = JobRequest(kind=audit_services.KIND, spec=spec.model_dump())
        job = await queue.enqueue(session, asked, owner_of(caller), idempotency_key=idempotency_key)
    job = await outcome_of(request, job.id, wait)
    if job.state in FINISHED and job.state != State.SUCCEEDED:
        raise AuditFailed(error_message(job))
    response.status_code = 200 if job.state in FINISHED else 202
    async with get_database().reading() as session:
        return await audit_view(session, job)


@router.get("/audit/history")
async def list_audits(caller: CurrentCaller, page: PageNumber = 1, page_size: PageSize = 10) -> AuditHistory:
    """Audits that have been done, the newest first."""
    async with get_database().reading() as session:
        total = await session.scalar(select(func.count()).select_from(Audit)) or 0
        newest = select(Audit).order_by(Audit.at.desc(), Audit.id.desc())
        rows = list(await session.scalars(newest.offset((page - 1) * page_size).limit(page_size)))
        applied = await audit_tables.applied_counts(session, [row.id for row in rows])
    audits = [
        PastAudit(
            audit_id=row.id,
            timestamp=row.at,
            services=row.services,
            total_recommendations=row.total,
            **{f"{name}_count": row.counts[name] for name in PRIORITIES},
            applied_count=applied.get(row.id, 0),
            failed_services=row.failed,
        )
        for row in rows
    ]
    return AuditHistory(audits=audits, pagination=pagination_of(page, page_size, total))


@router.get("/audit/{audit_id}")
async def show_audit(audit_id: Annotated[str, Path(max_length=40)], caller: CurrentCaller) -> AuditView:
    """An audit, or how far it is."""
    async with get_database().reading() as session:
        if row := await session.get(Audit, audit_id):
            return finished_audit_view(row)
        try:
            job = await queue.get(session, audit_services.job_id_of(audit_id))
        except JobNotFound:
            job = None
        if job is None or job.kind != audit_services.KIND or audit_id != audit_services.audit_id_of(job.id):
            raise AuditNotFound(f"Audit with ID {audit_id} not found")
        return await audit_view(session, job)


@router.get("/recommendations")
async def list_recommendations(
    caller: CurrentCaller,
    service: Word = None,
    priority: Annotated[Priority | SkipJsonSchema[None], Query()] = None,
    category: Annotated[Category | SkipJsonSchema[None], Query()] = None,
    applied: Annotated[bool | SkipJsonSchema[None], Query(description="Only those that are, or are not.")] = None,
    page: PageNumber = 1,
    page_size: PageSize = 10,
) -> RecommendationPage:
    """What is recommended, and what has been applied; the weightiest first."""
    filters = {"service": service, "priority": priority, "category": category, "applied": applied}
    wanted = audit_tables.shown()
    for column, value in ((Recommendation.priority, priority), (Recommendation.category, category)):
        if value is not None:
            wanted = wanted.where(column == value)
    if applied is not None:
        set_already = Recommendation.applied_at.is_not(None)
        wanted = wanted.where(set_already if applied else ~set_already)
    async with get_database().reading() as session:
        if service is not None:
            wanted = wanted.where(Recommendation.service_id == await _service_id(session, service))
        total = await session.scalar(select(func.count()).select_from(wanted.subquery())) or 0
        rows = await session.scalars(by_severity(wanted).offset((page - 1) * page_size).limit(page_size))
        names = await service_handles(session)
        views = [RecommendationView(**recommendation_fields(row, names)) for row in rows]
    return RecommendationPage(
        recommendations=views,
        pagination=pagination_of(page, page_size, total),
        filters_applied={name: value for name, value in filters.items() if value is not None},
    )


@router.get("/recommendations/{recommendation_id}")
async def show_recommendation(
    recommendation_id: Annotated[int, Path(ge=1, le=ID_MAX)], caller: CurrentCaller
) -> RecommendationDetail:
    async with get_database().reading() as session:
        row = await audit_tables.get(session, recommendation_id)
        facts = recommendation_fields(row, await service_handles(session))
    return RecommendationDetail(
        **facts,
        explanation=row.explanation,
        references=row.references,
        sources=row.sources,
        rule_id=row.rule_id,
        last_seen_at=row.seen_at,
        closed_at=row.closed_at,
        applied_at=row.applied_at,
        applied_by=row.applied_by,
    )


@router.post("/apply", responses=UNFINISHED)
async def apply_recommendations(
    wanted: ApplyRequest,
    caller: AdminCaller,
    request: Request,
    response: Response,
    wait: Wait = 60,
    idempotency_key: IdempotencyKey = None,
) -> ChangesView:
    """Set what is recommended. Each setting is read before and after; what was changed since is not overwritten."""
    return await _change("apply", wanted, caller, request, response, wait, idempotency_key)


@router.post("/rollback", responses=UNFINISHED)
async def roll_back(
    wanted: ApplyRequest,
    caller: AdminCaller,
    request: Request,
    response: Response,
    wait: Wait = 60,
    idempotency_key: IdempotencyKey = None,
) -> ChangesView:
    """Give settings that were applied their former values back, unless somebody has changed them since."""
    return await _change("restore", wanted, caller, request, response, wait, idempotency_key)


@router.get("/rules")
async def list_rules(caller: CurrentCaller) -> RulesView:
    """The rules that audits go by, your own among them, and what is wrong in their files."""
    known = await asyncio.to_thread(rules.load)
    return RulesView(
        rules=[
            RuleView(
                **{name: getattr(rule, name) for name in set(RuleView.model_fields) - {"by_hand"}},
                by_hand=rule.apply.is_by_hand,
            )
            for rule in known.rules
        ],
        problems=[str(problem) for problem in known.problems],
    )


async def _change(
    action: Any,
    wanted: ApplyRequest,
    caller: Caller,
    request: Request,
    response: Response,
    wait: float,
    idempotency_key: str | None,
) -> ChangesView:
    if not wanted.recommendation_ids:
        raise InvalidRequest("At least one recommendation must be specified")
    spec = ChangeSpec(action=action, recommendation_ids=wanted.recommendation_ids, dry_run=wanted.dry_run)
    async with get_database().transaction() as session:
        asked = JobRequest(kind=change_settings.KIND, spec=spec.model_dump())
        job = await queue.enqueue(session, asked, owner_of(caller), idempotency_key=idempotency_key)
    job = await outcome_of(request, job.id, wait)
    if job.state in FINISHED and job.state != State.SUCCEEDED:
        raise ChangeFailed(error_message(job))
    response.status_code = 200 if job.state in FINISHED else 202
    nothing = {"results": [], "summary": {"total": 0, "successful": 0, "failed": 0}, "dry_run": wanted.dry_run}
    return ChangesView.model_validate({**(job.result or nothing), "job_id": job.id, "status": job.state})


async def _service_id(session: AsyncSession, word: str) -> int:
    service = await service_store.find(session, word)
    if service is None:
        raise ServiceNotFound(f"There is no service of type '{word}'.")
    return service.id
