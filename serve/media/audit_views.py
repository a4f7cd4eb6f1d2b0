"""Serializes audits and recommendations for the API."""

from typing import Any

from sqlalchemy import Select, case
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.services import store as service_store
from jobs.states import State
from jobs.tables import Job
from pipelines.media.audit import audit_services
from pipelines.media.audit.rules import PRIORITIES
from pipelines.media.audit.tables import Audit, Recommendation
from serve.media.audit_schemas import AuditView, PageInfo

COPIED_FIELDS = (
    "id",
    "category",
    "current_value",
    "recommended_value",
    "priority",
    "rationale",
    "impact",
    "created_at",
)


def error_message(job: Job) -> str | None:
    return job.error["message"] if job.error else None


async def audit_view(session: AsyncSession, job: Job) -> AuditView:
    if row := await session.get(Audit, audit_services.audit_id_of(job.id)):
        return finished_audit_view(row)
    return AuditView(
        audit_id=audit_services.audit_id_of(job.id),
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
        error=error_message(job),
    )


def finished_audit_view(row: Audit) -> AuditView:
    return AuditView.model_validate(
        {
            "audit_id": row.id,
            "status": State.SUCCEEDED,
            "job_id": audit_services.job_id_of(row.id),
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


def by_severity(query: Select[Recommendation]) -> Select[Recommendation]:
    weight = case({name: number for number, name in enumerate(PRIORITIES)}, value=Recommendation.priority)
    return query.order_by(weight, Recommendation.id)


async def service_handles(session: AsyncSession) -> dict[int, str]:
    return {
        service.id: handle
        for handle, service in service_store.handles(await service_store.list_services(session)).items()
    }


def recommendation_fields(row: Recommendation, handles: dict[int, str]) -> dict[str, Any]:
    return {
        **{name: getattr(row, name) for name in COPIED_FIELDS},
        "service": handles[row.service_id],
        "setting_name": row.setting,
        "applied": row.applied_at is not None,
        "area": row.area,
        "item": row.entry_name or row.entry or None,
        "by_hand": row.by_hand,
    }


def pagination_of(page: int, page_size: int, total: int) -> PageInfo:
    return PageInfo(page=page, page_size=page_size, total_items=total, total_pages=-(-total // page_size))
