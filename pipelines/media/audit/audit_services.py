"""Kind `audit_services`: reads the settings of services, and keeps as recommendations what the rules find in them."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.ext.asyncio import AsyncSession

from cluster import events
from cluster.db import Database, after_commit, apart, now
from cluster.secrets import SealBroken
from cluster.services import store as service_store
from cluster.services.capabilities.settings import Areas, Entry
from cluster.services.errors import NotThere, ServiceError
from cluster.services.http.client import Client
from cluster.services.selection import choose
from cluster.services.store import Service
from jobs.context import Context
from jobs.registry import job
from jobs.tables import Job
from pipelines.media.audit import rules, web_search
from pipelines.media.audit import tables as audit_tables
from pipelines.media.audit.evaluate import Finding, find
from pipelines.media.audit.rules import PRIORITIES, Rule, Rules
from pipelines.media.audit.tables import Audit, AuditFinding, Recommendation
from pipelines.media.audit.web_search import Advice

KIND = "audit_services"
ROOM = "config_audit"
AT_ONCE = 8


class AuditSpec(BaseModel):
    """What to audit."""

    model_config = ConfigDict(extra="forbid")

    services: list[str] = Field(
        default_factory=list, max_length=100, description="By type or name. None: all whose settings can be read."
    )
    include_web_search: bool = Field(default=False, description="Whether to look for pages about what is found.")


@dataclass
class Outcome:
    """What has come of one service."""

    handle: str
    service: Service
    findings: list[Finding] = field(default_factory=list[Finding])
    error: str | None = None


@job(KIND, spec=AuditSpec, admin_only=True, concurrency=1, tracked=True)
def audit_services(context: Context, spec: AuditSpec) -> dict[str, Any]:
    """Audits the settings of services by rules, and keeps what is found as recommendations."""
    return asyncio.run(apart(lambda database: _audit(context, spec, database)))


def audit_id_of(job_id: str) -> str:
    return f"audit_{job_id.removeprefix('job_')}"


def job_id_of(audit_id: str) -> str:
    return f"job_{audit_id.removeprefix('audit_')}"


async def auditable(session: AsyncSession, words: Sequence[str]) -> dict[str, Service]:
    """The services that are meant, by their handles. No words mean all that can be audited."""
    services = await service_store.every(session)
    handles = {service.id: handle for handle, service in service_store.handles(services).items()}
    if not words:
        wanted = [service for service in services if service.enabled and service.connector.settings]
        return {handles[service.id]: service for service in wanted}
    found: dict[str, Service] = {}
    for word in words:
        service = await choose(session, lambda connector: connector.settings, "lets its settings be read", word)
        found[handles[service.id]] = service
    return found


async def _audit(context: Context, spec: AuditSpec, database: Database) -> dict[str, Any]:
    audit_id, began = audit_id_of(context.job_id), now()
    async with database.reading() as session:
        if done := await session.get(Audit, audit_id):
            return _told(done)  # by an attempt whose end nobody has heard of
        wanted = await auditable(session, spec.services)
    context.report(phase=f"{len(wanted)} services")
    known = await asyncio.to_thread(rules.load)
    outcomes = await _look_at_all(database, wanted, known)
    found = [finding for outcome in outcomes for finding in outcome.findings]
    context.report(progress=60, phase="searching the web" if spec.include_web_search else "recommending")
    web = (
        await web_search.search(database, found) if spec.include_web_search else Advice(False, "It was not asked for.")
    )
    async with database.transaction() as session:
        audit = await _keep(session, audit_id, began, outcomes, known, web)
        owner = await session.get(Job, context.job_id)
        audit.created_by = owner.created_by if owner else "local"
        after_commit(session, lambda: _tell(audit))
    context.report(
        progress=100,
        phase="done",
        recommendations=audit.total,
        services=len(audit.services),
        failed_services=len(audit.failed),
        **{f"priority_{name}": audit.counts[name] for name in PRIORITIES},
    )
    return _told(audit)


async def _look_at_all(database: Database, wanted: dict[str, Service], known: Rules) -> list[Outcome]:
    room = asyncio.Semaphore(AT_ONCE)

    async def look(handle: str, service: Service) -> Outcome:
        outcome = Outcome(handle, service)
        concerned = [rule for rule in known.rules if rule.service == service.connector.type]
        if service.connector.settings is None:
            return outcome
        async with room:
            try:
                async with service_store.connected(database, service) as client:
                    read = await read_areas(client, service.connector.settings, concerned)
                outcome.findings = find(concerned, read)
            except (ServiceError, SealBroken) as error:
                outcome.error = error.message
        return outcome

    return await asyncio.gather(*(look(handle, service) for handle, service in wanted.items()))


async def read_areas(client: Client, settings: Areas, concerned: Sequence[Rule]) -> dict[str, list[Entry]]:
    """Each area that these rules look at, read once. One that this version of a service does not have is left out."""
    read: dict[str, list[Entry]] = {}
    for area in sorted({area for rule in concerned for area in rule.areas}):
        try:
            read[area] = await settings.read(client, area)
        except NotThere:
            continue
    if concerned and not read:
        raise client.wrong()
    return read


async def _keep(
    session: AsyncSession, audit_id: str, began: datetime, outcomes: Sequence[Outcome], known: Rules, web: Advice
) -> Audit:
    kept: list[Recommendation] = []
    summary: dict[str, Any] = {}
    failed: dict[str, Any] = {}
    there = {service.id for service in await service_store.every(session)}
    for outcome in outcomes:
        if outcome.service.id not in there:
            failed[outcome.handle] = "It was deleted during the audit."
            continue
        if outcome.error is not None:
            failed[outcome.handle] = outcome.error
            continue
        rows = await audit_tables.keep(session, outcome.service.id, outcome.findings, web.sources, began)
        summary[outcome.handle] = {"issues_found": len(outcome.findings), "recommendations": len(rows)}
        kept += rows
    counts = Counter(row.priority for row in kept)
    audit = Audit(
        id=audit_id,
        at=now(),
        services=list(summary),
        failed=failed,
        summary=summary,
        counts={name: counts[name] for name in PRIORITIES},
        total=len(kept),
        rule_problems=[str(problem) for problem in known.problems],
        web_search=web.as_told(),
        created_by="",
    )
    session.add(audit)
    await session.flush()
    session.add_all(AuditFinding(audit_id=audit_id, recommendation_id=row.id) for row in kept)
    return audit


def _tell(audit: Audit) -> None:
    data = {"audit_id": audit.id, "recommendation_count": audit.total}
    events.publish([events.message([ROOM], "config.audit.completed", data, audit.at)])


def _told(audit: Audit) -> dict[str, Any]:
    """What its job's result, and so MLflow, says of an audit."""
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
