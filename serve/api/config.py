"""/api/v1/config: audits of the settings of services, what they recommend, and its application."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request, Response
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import Select, case, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import get_database
from cluster.errors import InvalidRequest, Unavailable
from cluster.services import register
from cluster.services.register import ServiceNotFound
from jobs import queue
from jobs.queue import JobNotFound, JobRequest
from jobs.states import FINISHED, State
from jobs.tables import Job
from pipelines.media import audit, change, recommendations, rules
from pipelines.media.audit import AuditSpec
from pipelines.media.change import ChangeSpec
from pipelines.media.recommendations import Audit, AuditNotFound, Recommendation
from pipelines.media.rules import PRIORITIES, Category, Priority
from serve.api.jobs import owner_of
from serve.auth import AdminCaller, Caller, CurrentCaller
from serve.bodies.config import (
    ApplyRequest,
    AuditHistory,
    AuditRequest,
    AuditView,
    ChangesView,
    Pagination,
    PastAudit,
    RecommendationDetail,
    RecommendationPage,
    RecommendationView,
    RulesView,
    RuleView,
)
from serve.envelope import ERROR_RESPONSES
from serve.outcomes import UNFINISHED, Wait, outcome_of

router = APIRouter(prefix="/api/v1/config", tags=["Configuration"], responses=ERROR_RESPONSES)

ID_MAX = 2**63 - 1
FIELDS = ("id", "category", "current_value", "recommended_value", "priority", "rationale", "impact", "created_at")

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
        await audit.auditable(session, spec.services)
        asked = JobRequest(kind=audit.KIND, spec=spec.model_dump())
        job = await queue.enqueue(session, asked, owner_of(caller), idempotency_key=idempotency_key)
    job = await outcome_of(request, job.id, wait)
    if job.state in FINISHED and job.state != State.SUCCEEDED:
        raise AuditFailed(_reason(job))
    response.status_code = 200 if job.state in FINISHED else 202
    async with get_database().reading() as session:
        return await _audit_view(session, job)


@router.get("/audit/history")
async def list_audits(caller: CurrentCaller, page: PageNumber = 1, page_size: PageSize = 10) -> AuditHistory:
    """Audits that have been done, the newest first."""
    async with get_database().reading() as session:
        total = await session.scalar(select(func.count()).select_from(Audit)) or 0
        newest = select(Audit).order_by(Audit.at.desc(), Audit.id.desc())
        rows = list(await session.scalars(newest.offset((page - 1) * page_size).limit(page_size)))
        applied = await recommendations.applied_counts(session, [row.id for row in rows])
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
    return AuditHistory(audits=audits, pagination=_pagination(page, page_size, total))


@router.get("/audit/{audit_id}")
async def show_audit(audit_id: Annotated[str, Path(max_length=40)], caller: CurrentCaller) -> AuditView:
    """An audit, or how far it is."""
    async with get_database().reading() as session:
        if row := await session.get(Audit, audit_id):
            return _view_of_done(row)
        try:
            job = await queue.get(session, audit.job_id_of(audit_id))
        except JobNotFound:
            job = None
        if job is None or job.kind != audit.KIND or audit_id != audit.audit_id_of(job.id):
            raise AuditNotFound(f"Audit with ID {audit_id} not found")
        return await _audit_view(session, job)


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
    wanted = recommendations.shown()
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
        rows = await session.scalars(_weightiest_first(wanted).offset((page - 1) * page_size).limit(page_size))
        names = await _handles(session)
        views = [RecommendationView(**_facts(row, names)) for row in rows]
    return RecommendationPage(
        recommendations=views,
        pagination=_pagination(page, page_size, total),
        filters_applied={name: value for name, value in filters.items() if value is not None},
    )


@router.get("/recommendations/{recommendation_id}")
async def show_recommendation(
    recommendation_id: Annotated[int, Path(ge=1, le=ID_MAX)], caller: CurrentCaller
) -> RecommendationDetail:
    async with get_database().reading() as session:
        row = await recommendations.get(session, recommendation_id)
        facts = _facts(row, await _handles(session))
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
        asked = JobRequest(kind=change.KIND, spec=spec.model_dump())
        job = await queue.enqueue(session, asked, owner_of(caller), idempotency_key=idempotency_key)
    job = await outcome_of(request, job.id, wait)
    if job.state in FINISHED and job.state != State.SUCCEEDED:
        raise ChangeFailed(_reason(job))
    response.status_code = 200 if job.state in FINISHED else 202
    nothing = {"results": [], "summary": {"total": 0, "successful": 0, "failed": 0}, "dry_run": wanted.dry_run}
    return ChangesView.model_validate({**(job.result or nothing), "job_id": job.id, "status": job.state})


def _reason(job: Job) -> str | None:
    return job.error["message"] if job.error else None


async def _audit_view(session: AsyncSession, job: Job) -> AuditView:
    if row := await session.get(Audit, audit.audit_id_of(job.id)):
        return _view_of_done(row)
    return AuditView(
        audit_id=audit.audit_id_of(job.id),
        status=State(job.state),
        job_id=job.id,
        timestamp=job.created_at,
        services_audited=[],
        failed_services={},
        total_recommendations=None,
        recommendations_by_priority=None,
        summary={},
        rule_problems=[],
        web_search=None,
        error=_reason(job),
    )


def _view_of_done(row: Audit) -> AuditView:
    return AuditView.model_validate(
        {
            "audit_id": row.id,
            "status": State.SUCCEEDED,
            "job_id": audit.job_id_of(row.id),
            "timestamp": row.at,
            "services_audited": row.services,
            "failed_services": row.failed,
            "total_recommendations": row.total,
            "recommendations_by_priority": row.counts,
            "summary": row.summary,
            "rule_problems": row.rule_problems,
            "web_search": row.web_search,
            "error": None,
        }
    )


def _weightiest_first(wanted: Select[Recommendation]) -> Select[Recommendation]:
    weight = case({name: number for number, name in enumerate(PRIORITIES)}, value=Recommendation.priority)
    return wanted.order_by(weight, Recommendation.id)


async def _service_id(session: AsyncSession, word: str) -> int:
    service = await register.find(session, word)
    if service is None:
        raise ServiceNotFound(f"There is no service of type '{word}'.")
    return service.id


async def _handles(session: AsyncSession) -> dict[int, str]:
    return {service.id: handle for handle, service in register.handles(await register.every(session)).items()}


def _facts(row: Recommendation, names: dict[int, str]) -> dict[str, Any]:
    return {
        **{name: getattr(row, name) for name in FIELDS},
        "service": names[row.service_id],
        "setting_name": row.setting,
        "applied": row.applied_at is not None,
        "area": row.area,
        "item": row.entry_name or row.entry or None,
        "by_hand": row.by_hand,
    }


def _pagination(page: int, page_size: int, total: int) -> Pagination:
    return Pagination(page=page, page_size=page_size, total_items=total, total_pages=-(-total // page_size))
