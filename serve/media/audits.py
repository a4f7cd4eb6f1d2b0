"""The routes /api/v1/config: audits of the settings of services, and their recommendations."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request, Response
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import get_database
from cluster.errors import InvalidRequest, Unavailable
from cluster.ownership import LOCAL, Principal
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
from serve.http.job_wait import UNFINISHED_RESPONSE, WaitSeconds, wait_for_job
from serve.http.marks import rate_limit
from serve.http.pagination import offset_slice
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
    rule_problems,
    service_handles,
)
from serve.security.callers import AdminCaller, CurrentCaller

router = APIRouter(prefix="/api/v1/config")

MAX_ID = 2**63 - 1

PageNumber = Annotated[int, Query(ge=1, le=2**31 - 1, description="Counted from 1.")]
PageSize = Annotated[int, Query(ge=1, le=100)]
ServiceName = Annotated[
    str | SkipJsonSchema[None], Query(min_length=1, max_length=100, description="Type or name of the service.")
]
IdempotencyKey = Annotated[str | None, Header(min_length=1, max_length=200)]


class AuditFailed(Unavailable):
    """The audit failed."""

    code = "AUDIT_FAILED"


class ChangeFailed(Unavailable):
    """The changes failed. The recommendations show which of them were made."""

    code = "CHANGE_FAILED"


@router.post("/audit", responses=UNFINISHED_RESPONSE)
@rate_limit("audit")
async def audit_configuration(
    body: AuditRequest,
    caller: AdminCaller,
    request: Request,
    response: Response,
    wait: WaitSeconds = 60,
    idempotency_key: IdempotencyKey = None,
) -> AuditView:
    """Audit the settings of services. Services that do not respond are listed in `failed_services`."""
    if not body.services:
        raise InvalidRequest("At least one service must be specified")
    spec = AuditSpec(services=list(dict.fromkeys(body.services)), include_web_search=body.include_web_search)
    async with get_database().transaction() as session:
        await audit_services.find_auditable(session, spec.services)
        job_request = JobRequest(kind=audit_services.KIND, spec=spec.model_dump())
        job = await queue.enqueue(session, job_request, caller, idempotency_key=idempotency_key)
    job = await wait_for_job(request, job.id, wait)
    if job.state in FINISHED and job.state != State.SUCCEEDED:
        raise AuditFailed(error_message(job))
    response.status_code = 200 if job.state in FINISHED else 202
    async with get_database().read_transaction() as session:
        return await audit_view(session, job, caller)


@router.get("/audit/history")
@rate_limit("recommendations")
async def list_audits(caller: CurrentCaller, page: PageNumber = 1, page_size: PageSize = 10) -> AuditHistory:
    """List the finished audits, the newest first."""
    async with get_database().read_transaction() as session:
        newest_first = select(Audit).order_by(Audit.at.desc(), Audit.id.desc())
        rows = await offset_slice(session, newest_first, (page - 1) * page_size, page_size)
        applied = await audit_tables.applied_counts(session, [row.id for row in rows.items])
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
        for row in rows.items
    ]
    return AuditHistory(audits=audits, pagination=pagination_of(page, page_size, rows.total))


@router.get("/audit/{audit_id}")
@rate_limit("recommendations")
async def show_audit(audit_id: Annotated[str, Path(max_length=40)], caller: CurrentCaller) -> AuditView:
    """Get an audit, which may be unfinished."""
    async with get_database().read_transaction() as session:
        if row := await session.get(Audit, audit_id):
            return finished_audit_view(row, caller)
        try:
            job = await queue.get(session, audit_services.job_id_of(audit_id), LOCAL)
        except JobNotFound:
            job = None
        if job is None or job.kind != audit_services.KIND or audit_id != audit_services.audit_id_of(job.id):
            raise AuditNotFound(f"Audit with ID {audit_id} not found")
        return await audit_view(session, job, caller)


@router.get("/recommendations")
@rate_limit("recommendations")
async def list_recommendations(
    caller: CurrentCaller,
    service: ServiceName = None,
    priority: Annotated[Priority | SkipJsonSchema[None], Query()] = None,
    category: Annotated[Category | SkipJsonSchema[None], Query()] = None,
    applied: Annotated[
        bool | SkipJsonSchema[None], Query(description="Only recommendations that are, or are not, applied.")
    ] = None,
    page: PageNumber = 1,
    page_size: PageSize = 10,
) -> RecommendationPage:
    """List open and applied recommendations, those of the highest priority first."""
    filters = {"service": service, "priority": priority, "category": category, "applied": applied}
    query = audit_tables.visible_recommendations()
    for column, value in ((Recommendation.priority, priority), (Recommendation.category, category)):
        if value is not None:
            query = query.where(column == value)
    if applied is not None:
        is_applied = Recommendation.applied_at.is_not(None)
        query = query.where(is_applied if applied else ~is_applied)
    async with get_database().read_transaction() as session:
        if service is not None:
            query = query.where(Recommendation.service_id == await _service_id(session, service))
        rows = await offset_slice(session, by_severity(query), (page - 1) * page_size, page_size)
        handles = await service_handles(session)
        views = [RecommendationView(**recommendation_fields(row, handles, caller)) for row in rows.items]
    return RecommendationPage(
        recommendations=views,
        pagination=pagination_of(page, page_size, rows.total),
        filters_applied={name: value for name, value in filters.items() if value is not None},
    )


@router.get("/recommendations/{recommendation_id}")
@rate_limit("recommendations")
async def show_recommendation(
    recommendation_id: Annotated[int, Path(ge=1, le=MAX_ID)], caller: CurrentCaller
) -> RecommendationDetail:
    async with get_database().read_transaction() as session:
        row = await audit_tables.get(session, recommendation_id)
        fields = recommendation_fields(row, await service_handles(session), caller)
    return RecommendationDetail(
        **fields,
        explanation=row.explanation,
        references=row.references,
        sources=row.sources,
        rule_id=row.rule_id,
        last_seen_at=row.seen_at,
        closed_at=row.closed_at,
        applied_at=row.applied_at,
        applied_by=row.applied_by,
    )


@router.post("/apply", responses=UNFINISHED_RESPONSE)
@rate_limit("apply")
async def apply_recommendations(
    body: ApplyRequest,
    caller: AdminCaller,
    request: Request,
    response: Response,
    wait: WaitSeconds = 60,
    idempotency_key: IdempotencyKey = None,
) -> ChangesView:
    """Apply recommendations. A setting that was changed since the audit is not overwritten."""
    return await _change("apply", body, caller, request, response, wait, idempotency_key)


@router.post("/rollback", responses=UNFINISHED_RESPONSE)
@rate_limit("apply")
async def roll_back(
    body: ApplyRequest,
    caller: AdminCaller,
    request: Request,
    response: Response,
    wait: WaitSeconds = 60,
    idempotency_key: IdempotencyKey = None,
) -> ChangesView:
    """Restore the former values of settings. A setting that was changed since it was applied stays."""
    return await _change("restore", body, caller, request, response, wait, idempotency_key)


@router.get("/rules")
@rate_limit("recommendations")
async def list_rules(caller: CurrentCaller) -> RulesView:
    """List the rules of audits, including your own, and the errors in their files."""
    rule_set = await asyncio.to_thread(rules.load)
    return RulesView(
        rules=[
            RuleView(
                **{name: getattr(rule, name) for name in set(RuleView.model_fields) - {"by_hand"}},
                by_hand=rule.apply.is_by_hand,
            )
            for rule in rule_set.rules
        ],
        problems=rule_problems(rule_set.problems, caller),
    )


async def _change(
    action: Any,
    body: ApplyRequest,
    caller: Principal,
    request: Request,
    response: Response,
    wait: float,
    idempotency_key: str | None,
) -> ChangesView:
    if not body.recommendation_ids:
        raise InvalidRequest("At least one recommendation must be specified")
    spec = ChangeSpec(action=action, recommendation_ids=body.recommendation_ids, dry_run=body.dry_run)
    async with get_database().transaction() as session:
        job_request = JobRequest(kind=change_settings.KIND, spec=spec.model_dump())
        job = await queue.enqueue(session, job_request, caller, idempotency_key=idempotency_key)
    job = await wait_for_job(request, job.id, wait)
    if job.state in FINISHED and job.state != State.SUCCEEDED:
        raise ChangeFailed(error_message(job))
    response.status_code = 200 if job.state in FINISHED else 202
    empty_result = {"results": [], "summary": {"total": 0, "successful": 0, "failed": 0}, "dry_run": body.dry_run}
    return ChangesView.model_validate({**(job.result or empty_result), "job_id": job.id, "status": job.state})


async def _service_id(session: AsyncSession, name: str) -> int:
    service = await service_store.find(session, name)
    if service is None:
        raise ServiceNotFound(f"There is no service of type '{name}'.")
    return service.id
