"""The kind `audit_services`: read the settings of services, apply the rules, and store recommendations."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.ext.asyncio import AsyncSession

from cluster import events
from cluster.db import Database, after_commit, now, run_with_database
from cluster.secrets import SealBroken
from cluster.services import store as service_store
from cluster.services.capabilities.settings import SettingsAreas, SettingsEntry
from cluster.services.errors import NotFoundInService, ServiceError
from cluster.services.http.client import Client
from cluster.services.selection import choose_service
from cluster.services.store import Service
from jobs.context import Context
from jobs.registry import job
from jobs.tables import Job
from pipelines.media.audit import rules, web_search
from pipelines.media.audit import tables as audit_tables
from pipelines.media.audit.evaluate import Finding, evaluate_rules
from pipelines.media.audit.rules import PRIORITIES, Rule, RuleSet
from pipelines.media.audit.tables import Audit, AuditFinding, Recommendation
from pipelines.media.audit.web_search import WebSearchResult

KIND = "audit_services"
ROOM = "config_audit"
MAX_CONCURRENCY = 8


class AuditSpec(BaseModel):
    """The services to audit, and how."""

    model_config = ConfigDict(extra="forbid")

    services: list[str] = Field(
        default_factory=list, max_length=100, description="By type or name. Empty: all whose settings can be read."
    )
    include_web_search: bool = Field(default=False, description="Search the web for pages about the findings.")


@dataclass
class ServiceAudit:
    """The findings of one service, or the error."""

    handle: str
    service: Service
    findings: list[Finding] = field(default_factory=list[Finding])
    error: str | None = None


@job(KIND, spec=AuditSpec, admin_only=True, concurrency=1, tracked=True)
def audit_services(context: Context, spec: AuditSpec) -> dict[str, Any]:
    """Audits the settings of services by rules, and stores the findings as recommendations."""
    return run_with_database(lambda database: _audit(context, spec, database))


def audit_id_of(job_id: str) -> str:
    return f"audit_{job_id.removeprefix('job_')}"


def job_id_of(audit_id: str) -> str:
    return f"job_{audit_id.removeprefix('audit_')}"


async def find_auditable(session: AsyncSession, names: Sequence[str]) -> dict[str, Service]:
    """The services with these types or names, by their handles. Without names, all that can be audited."""
    services = await service_store.list_services(session)
    handles = {service.id: handle for handle, service in service_store.handles(services).items()}
    if not names:
        selected = [service for service in services if service.enabled and service.connector.settings]
        return {handles[service.id]: service for service in selected}
    found: dict[str, Service] = {}
    for name in names:
        service = await choose_service(session, lambda connector: connector.settings, "lets its settings be read", name)
        found[handles[service.id]] = service
    return found


async def _audit(context: Context, spec: AuditSpec, database: Database) -> dict[str, Any]:
    audit_id, started_at = audit_id_of(context.job_id), now()
    async with database.read_transaction() as session:
        if existing := await session.get(Audit, audit_id):
            return _audit_result(existing)  # of an earlier attempt, which was lost before it could return
        services = await find_auditable(session, spec.services)
    context.report(phase=f"{len(services)} services")
    rule_set = await asyncio.to_thread(rules.load)
    outcomes = await _audit_all(database, services, rule_set)
    findings = [finding for outcome in outcomes for finding in outcome.findings]
    context.report(progress=60, phase="searching the web" if spec.include_web_search else "recommending")
    web_result = (
        await web_search.search(database, findings)
        if spec.include_web_search
        else WebSearchResult(False, "It was not requested.")
    )
    async with database.transaction() as session:
        audit = await _save_audit(session, audit_id, started_at, outcomes, rule_set, web_result)
        owner = await session.get(Job, context.job_id)
        audit.created_by = owner.created_by if owner else "local"
        after_commit(session, lambda: _publish_completed(audit))
    context.report(
        progress=100,
        phase="done",
        recommendations=audit.total,
        services=len(audit.services),
        failed_services=len(audit.failed),
        **{f"priority_{name}": audit.counts[name] for name in PRIORITIES},
    )
    return _audit_result(audit)


async def _audit_all(database: Database, services: dict[str, Service], rule_set: RuleSet) -> list[ServiceAudit]:
    semaphore = asyncio.Semaphore(MAX_CONCURRENCY)

    async def audit_one(handle: str, service: Service) -> ServiceAudit:
        outcome = ServiceAudit(handle, service)
        relevant_rules = [rule for rule in rule_set.rules if rule.service == service.connector.type]
        if service.connector.settings is None:
            return outcome
        async with semaphore:
            try:
                async with service_store.open_client(database, service) as client:
                    by_area = await read_areas(client, service.connector.settings, relevant_rules)
                outcome.findings = evaluate_rules(relevant_rules, by_area)
            except (ServiceError, SealBroken) as error:
                outcome.error = error.message
        return outcome

    return await asyncio.gather(*(audit_one(handle, service) for handle, service in services.items()))


async def read_areas(
    client: Client, settings: SettingsAreas, relevant_rules: Sequence[Rule]
) -> dict[str, list[SettingsEntry]]:
    """Read each area that these rules need once. Areas that this version of the service lacks are left out."""
    by_area: dict[str, list[SettingsEntry]] = {}
    for area in sorted({area for rule in relevant_rules for area in rule.areas}):
        try:
            by_area[area] = await settings.read(client, area)
        except NotFoundInService:
            continue
    if relevant_rules and not by_area:
        raise client.wrong_service()
    return by_area


async def _save_audit(
    session: AsyncSession,
    audit_id: str,
    started_at: datetime,
    outcomes: Sequence[ServiceAudit],
    rule_set: RuleSet,
    web_result: WebSearchResult,
) -> Audit:
    saved: list[Recommendation] = []
    summary: dict[str, Any] = {}
    failed: dict[str, Any] = {}
    existing_ids = {service.id for service in await service_store.list_services(session)}
    for outcome in outcomes:
        if outcome.service.id not in existing_ids:
            failed[outcome.handle] = "It was deleted during the audit."
            continue
        if outcome.error is not None:
            failed[outcome.handle] = outcome.error
            continue
        rows = await audit_tables.save_findings(
            session, outcome.service.id, outcome.findings, web_result.sources, started_at
        )
        summary[outcome.handle] = {"issues_found": len(outcome.findings), "recommendations": len(rows)}
        saved += rows
    counts = Counter(row.priority for row in saved)
    audit = Audit(
        id=audit_id,
        at=now(),
        services=list(summary),
        failed=failed,
        summary=summary,
        counts={name: counts[name] for name in PRIORITIES},
        total=len(saved),
        rule_problems=[str(problem) for problem in rule_set.problems],
        web_search=web_result.to_dict(),
        created_by="",
    )
    session.add(audit)
    await session.flush()
    session.add_all(AuditFinding(audit_id=audit_id, recommendation_id=row.id) for row in saved)
    return audit


def _publish_completed(audit: Audit) -> None:
    data = {"audit_id": audit.id, "recommendation_count": audit.total}
    events.publish([events.build_message([ROOM], "config.audit.completed", data, audit.at)])


def _audit_result(audit: Audit) -> dict[str, Any]:
    """The result of the job, which also goes to MLflow."""
    return {
        "audit_id": audit.id,
        "services_audited": audit.services,
        "failed_services": audit.failed,
        "total_recommendations": audit.total,
        "recommendations_by_priority": audit.counts,
        "summary": audit.summary,
        "rule_problems": audit.rule_problems,
        "web_search": audit.web_search,
    }
