"""Serializes audits and recommendations for the API.

Plain users see neither where files of rules are, nor the present values of settings that concern security: those show
which service has no login.
"""

import re
from collections.abc import Iterable
from typing import Any

from sqlalchemy import Select, case
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.ownership import Principal
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
    "recommended_value",
    "priority",
    "rationale",
    "impact",
    "created_at",
)


FOLDER = re.compile(r"^.*/(?=[^/]+:\d+: )")
"""The folder in FILE:LINE: reason."""


def error_message(job: Job) -> str | None:
    return job.error["message"] if job.error else None


async def audit_view(session: AsyncSession, job: Job, caller: Principal) -> AuditView:
    if row := await session.get(Audit, audit_services.audit_id_of(job.id)):
        return finished_audit_view(row, caller)
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


def finished_audit_view(row: Audit, caller: Principal) -> AuditView:
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
            "rule_problems": rule_problems(row.rule_problems, caller),
            "web_search": row.web_search,
            "error": None,
        }
    )


def rule_problems(problems: Iterable[object], caller: Principal) -> list[str]:
    return [str(problem) if caller.is_admin else FOLDER.sub("", str(problem)) for problem in problems]


def by_severity(query: Select[Recommendation]) -> Select[Recommendation]:
    weight = case({name: number for number, name in enumerate(PRIORITIES)}, value=Recommendation.priority)
    return query.order_by(weight, Recommendation.id)


async def service_handles(session: AsyncSession) -> dict[int, str]:
    return {
        service.id: handle
        for handle, service in service_store.handles(await service_store.list_services(session)).items()
    }


def recommendation_fields(row: Recommendation, handles: dict[int, str], caller: Principal) -> dict[str, Any]:
    is_hidden = row.category == "security" and not caller.is_admin
    return {
        **{name: getattr(row, name) for name in COPIED_FIELDS},
        "current_value": None if is_hidden else row.current_value,
        "service": handles[row.service_id],
        "setting_name": row.setting,
        "applied": row.applied_at is not None,
        "area": row.area,
        "item": row.entry_name or row.entry or None,
        "by_hand": row.by_hand,
    }


def pagination_of(page: int, page_size: int, total: int) -> PageInfo:
    return PageInfo(page=page, page_size=page_size, total_items=total, total_pages=-(-total // page_size))
