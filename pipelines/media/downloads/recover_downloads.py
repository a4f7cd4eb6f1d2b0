"""The kind `recover_downloads`: retry or replace failed and stuck downloads, as the policy says.

First it finishes actions that an earlier run began when its worker died; steps that were taken are not repeated. Then
it makes and stores all decisions, and carries out one action after another.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import Database, advisory_lock, now, run_with_database
from cluster.secrets import SealBroken
from cluster.services import store as service_store
from cluster.services.capabilities.download_tracking import DownloadTracker, FinishedFolders
from cluster.services.errors import ServiceError
from cluster.services.store import Service
from cluster.settings import get_settings
from jobs.context import Context
from jobs.registry import job
from pipelines.media.downloads import log as recovery_log
from pipelines.media.downloads import orphans
from pipelines.media.downloads.actions import execute_recovery
from pipelines.media.downloads.cases import RECOVER_KIND, find_cases, followed_services
from pipelines.media.downloads.log import Recovery, build_recovery
from pipelines.media.downloads.policy import ACTIONS, Decision, History, RecoveryCase, RecoveryPolicy, decide
from pipelines.media.downloads.tables import FollowedDownload, FollowedService

MAX_CASES_PER_RUN = 50
DAY = timedelta(days=1)

TrackedServices = Mapping[int, tuple[Service, DownloadTracker]]


class RecoverDownloadsSpec(BaseModel):
    """Whether to carry out the decisions."""

    model_config = ConfigDict(extra="forbid")

    dry_run: bool | None = Field(default=None, description="Only decide, without acting. Null: as the policy says.")


@dataclass(frozen=True)
class RecoveryTarget:
    """The service that would carry out an action, and its id of the download."""

    service: Service
    item: str
    content: tuple[str, ...] = ()
    bytes_left: int | None = None


@job(RECOVER_KIND, spec=RecoverDownloadsSpec, admin_only=True, concurrency=1, tracked=True)
def recover_downloads(context: Context, spec: RecoverDownloadsSpec) -> dict[str, Any]:
    """Retries or replaces failed and stuck downloads, as the policy says."""
    result = run_with_database(lambda database: _recover(context, spec, database))
    # Numbers of the last day, so that MLflow shows a curve over many runs.
    last_day: dict[str, float] = result.pop("last_day")
    context.report(100, None, **last_day)
    return result


async def _recover(context: Context, spec: RecoverDownloadsSpec, database: Database) -> dict[str, Any]:
    async with database.read_transaction() as session:
        policy, _ = await recovery_log.current_policy(session)
        services = {service.id: (service, tracker) for service, tracker in await followed_services(session)}
    is_manual = spec.dry_run is not None
    execute = not (spec.dry_run if is_manual else policy.dry_run)
    outcomes: dict[str, int] = {}
    if policy.enabled or is_manual:
        outcomes = await _run_recoveries(context, database, services, policy, execute=execute, is_manual=is_manual)
    async with database.read_transaction() as session:
        last_day = await recovery_log.outcome_counts(session, now() - DAY)
    return {"enabled": policy.enabled, "dry_run": not execute, "outcomes": outcomes, "last_day": last_day}


async def _run_recoveries(
    context: Context,
    database: Database,
    services: TrackedServices,
    policy: RecoveryPolicy,
    *,
    execute: bool,
    is_manual: bool,
) -> dict[str, int]:
    """Finish, decide and carry out recoveries. `is_manual`: a person asked for it, and a dry run changes no row."""
    recoveries: list[Recovery] = []
    if execute or not is_manual:
        async with database.read_transaction() as session:
            unfinished = await recovery_log.unfinished_recoveries(session, now())
        for recovery in unfinished:
            context.report(phase=f"checking '{recovery.title}'")
            await execute_recovery(database, services, recovery, resumed=True)
    async with database.read_transaction() as session:
        open_cases = await find_cases(session, policy, services, now(), ignore_delay=is_manual)
    for row in open_cases[:MAX_CASES_PER_RUN]:
        context.report(phase=f"'{row.title}'")
        if recovery := await _decide(
            context, database, services, row, execute=execute, updates_row=execute or not is_manual
        ):
            recoveries.append(recovery)
    recoveries += await _decide_leftovers(context, database, services, execute=execute)
    todo = [recovery for recovery in recoveries if recovery.outcome == "begun"]
    for number, recovery in enumerate(todo):
        context.report(progress=100 * number / len(todo), phase=f"{recovery.decision} '{recovery.title}'")
        await execute_recovery(database, services, recovery, resumed=False)
    counts: dict[str, int] = {}
    for recovery in recoveries:
        context.log(f"{recovery.service}: '{recovery.title}': {recovery.decision}: {recovery.reason}")
        name = f"{recovery.decision}, {recovery.outcome}"
        counts[name] = counts.get(name, 0) + 1
    return counts


async def _decide(
    context: Context,
    database: Database,
    services: TrackedServices,
    row: FollowedDownload,
    *,
    execute: bool,
    updates_row: bool,
) -> Recovery | None:
    """Decide about a download, and store the decision. None if it repeats the last one."""
    case, target = await _build_case(database, services, row)
    async with database.transaction() as session:
        await advisory_lock(session, Recovery.__tablename__)
        policy, _ = await recovery_log.current_policy(session)
        at = now()
        history = await recovery_log.load_history(session, target.service.id, target.item, row.title, at)
        decision = decide(policy, case, history, at)
        if updates_row:
            await _update_row(session, row, decision, policy, at)
        service_columns = {"service_id": target.service.id, "service": target.service.name, "item": target.item}
        recovery = build_recovery(
            decision,
            policy,
            execute=execute,
            at=at,
            job_id=context.job_id,
            title=row.title,
            content=list(target.content),
            stood_at=target.bytes_left if case.state == "running" else None,
            **service_columns,
        )
        return recovery if await recovery_log.record_decision(session, recovery) else None


async def _update_row(
    session: AsyncSession, evaluated: FollowedDownload, decision: Decision, policy: RecoveryPolicy, at: datetime
) -> None:
    """Store when the download is decided again, unless its state or reason has changed meanwhile."""
    row = await session.get(FollowedDownload, evaluated.id, with_for_update=True)
    if row is None or (row.state, row.reason) != (evaluated.state, evaluated.reason):
        return
    if decision.verdict in ACTIONS:
        # If the action does not help, the download is decided again after the cooldown.
        row.decide_at = at + timedelta(minutes=max(policy.cooldown_minutes, 1))
        return
    row.decide_at = decision.again_at
    row.settled = decision.verdict != "wait"


async def _build_case(
    database: Database, services: TrackedServices, row: FollowedDownload
) -> tuple[RecoveryCase, RecoveryTarget]:
    """The case of a download, and the target of an action on it."""
    service, tracker = services[row.service_id]
    case = RecoveryCase(row.state, row.strikes, row.moved_at, row.reason, tuple(row.tags))
    if tracker.replacement is not None:
        target = RecoveryTarget(service, row.item, tuple(row.content), row.bytes_left)
        return replace(case, chosen_by=service.name, replaced_by=service.name), target
    unsure = None
    for other_service, other_tracker in services.values():
        if other_tracker.replacement is None or row.download_id is None:
            continue
        try:
            async with service_store.open_client(database, other_service) as client:
                queued = await other_tracker.replacement.find(client, row.download_id)
                grab = await other_tracker.replacement.find_grab(client, row.download_id)
        except (ServiceError, SealBroken):
            unsure = other_service.name
            continue
        if queued is None and grab is None:
            continue
        content = queued.content if queued else grab.content if grab else ()
        tags = queued.tags if queued else grab.tags if grab else ()
        reasons = [case.reason, queued.reason if queued else ""]
        matched_case = replace(
            case,
            reason="; ".join(text for text in dict.fromkeys(reasons) if text),
            tags=(*case.tags, *tags),
            chosen_by=other_service.name,
            replaced_by=other_service.name if queued else None,
            is_marked=queued is not None or (grab is not None and (grab.failed or grab.imported)),
        )
        return matched_case, RecoveryTarget(
            other_service, row.download_id, content, queued.bytes_left if queued else None
        )
    retried_by = service.name if tracker.retry else None
    return replace(case, retried_by=retried_by, unsure=unsure), RecoveryTarget(service, row.item)


async def _decide_leftovers(
    context: Context, database: Database, services: TrackedServices, *, execute: bool
) -> list[Recovery]:
    """Decide about leftover folders, and store the decisions. Returns those that are new."""
    recoveries: list[Recovery] = []
    for service, tracker in services.values():
        if tracker.finished_folders is None:
            continue
        context.report(phase=f"leftover folders of {service.name}")
        try:
            async with service_store.open_client(database, service) as client:
                finished = await tracker.finished_folders(client)
        except (ServiceError, SealBroken) as error:
            context.log(f"{service.name}: its folders cannot be read: {error.message}", "WARNING")
            async with database.transaction() as session:
                await _mark_leftovers_checked(session, service, now())
            continue
        found = await asyncio.to_thread(_find_leftovers, context, service.name, finished)
        async with database.transaction() as session:
            await advisory_lock(session, Recovery.__tablename__)
            policy, _ = await recovery_log.current_policy(session)
            at = now()
            await _mark_leftovers_checked(session, service, at)
            for leftover in found:
                history = await recovery_log.load_history(
                    session, service.id, leftover.service_path, leftover.service_path, at
                )
                recovery = build_recovery(
                    _decide_folder(policy, leftover, history, at),
                    policy,
                    execute=execute,
                    at=at,
                    job_id=context.job_id,
                    service_id=service.id,
                    service=service.name,
                    item=leftover.service_path,
                    title=leftover.path.name,
                )
                if await recovery_log.record_decision(session, recovery):
                    recoveries.append(recovery)
    return recoveries


async def _mark_leftovers_checked(session: AsyncSession, service: Service, at: datetime) -> None:
    """Prevent another search within the hour, even if this one failed."""
    if followed := await session.get(FollowedService, service.id, with_for_update=True):
        followed.leftovers_at = at


def _find_leftovers(context: Context, name: str, finished: FinishedFolders) -> list[orphans.LeftoverFolder]:
    try:
        return orphans.find(finished, get_settings().media.folders)
    except OSError as error:
        context.log(f"{name}: its folders cannot be read on this machine: {error}", "WARNING")
        return []


def _decide_folder(
    policy: RecoveryPolicy, leftover: orphans.LeftoverFolder, history: History, at: datetime
) -> Decision:
    description = "a folder of a failed download that its service no longer knows"
    if policy.leftovers == "report":
        return Decision("report", description)
    if not leftover.is_removable:
        return Decision("report", f"{description}; media.folders does not map it, so it may not be the service's")
    if at - leftover.changed_at < timedelta(days=policy.leftover_days):
        return Decision("report", f"{description}; it is removed when it is {policy.leftover_days:g} days old")
    if history.has_unfinished:
        return Decision("wait", "the outcome of the last action is unknown")
    if history.actions_last_hour >= policy.max_per_hour:
        return Decision("wait", "remove_folder waits: max_per_hour is reached")
    return Decision("remove_folder", f"{description}, for more than {policy.leftover_days:g} days")
