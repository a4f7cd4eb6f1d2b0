"""Kind `recover_downloads`: has failed and stuck downloads fetched again, or replaced by others, as the policy says.

Decisions first, all of them, with their reasons; then one action after another. What an earlier run had begun when its
worker died is looked into before anything else: what has happened is not done again.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import Database, apart, now, one_at_a_time
from cluster.secrets import SealBroken
from cluster.services import store as service_store
from cluster.services.capabilities.download_tracking import Finished, Following
from cluster.services.errors import ServiceError
from cluster.services.store import Service
from cluster.settings import get_settings
from jobs.context import Context
from jobs.registry import job
from pipelines.media.downloads import log as recovery_log
from pipelines.media.downloads import orphans
from pipelines.media.downloads.actions import carry_out
from pipelines.media.downloads.cases import RECOVER, cases, followed_services
from pipelines.media.downloads.log import Recovery, as_recovery
from pipelines.media.downloads.policy import ACTIONS, Case, Decision, Past, RecoveryPolicy, decide
from pipelines.media.downloads.tables import FollowedDownload, FollowedService

CASES_AT_ONCE = 50
DAY = timedelta(days=1)

Followed = Mapping[int, tuple[Service, Following]]


class RecoverDownloadsSpec(BaseModel):
    """Whether to do what is decided."""

    model_config = ConfigDict(extra="forbid")

    dry_run: bool | None = Field(default=None, description="Only say what would be done. Null: as the policy says.")


@dataclass(frozen=True)
class Target:
    """Whom an action would be asked of, and what it is about."""

    service: Service
    item: str
    content: tuple[str, ...] = ()
    bytes_left: int | None = None


@job(RECOVER, spec=RecoverDownloadsSpec, admin_only=True, concurrency=1, tracked=True)
def recover_downloads(context: Context, spec: RecoverDownloadsSpec) -> dict[str, Any]:
    """Has failed and stuck downloads fetched again, or replaced by others, as the policy says."""
    told = asyncio.run(apart(lambda database: _recover(context, spec, database)))
    # Of the last day, so that the runs of weeks make a curve.
    last_day: dict[str, float] = told.pop("last_day")
    context.report(100, None, **last_day)
    return told


async def _recover(context: Context, spec: RecoverDownloadsSpec, database: Database) -> dict[str, Any]:
    async with database.reading() as session:
        policy, _ = await recovery_log.policy_of(session)
        services = {service.id: (service, following) for service, following in await followed_services(session)}
    wished = spec.dry_run is not None
    acts = not (spec.dry_run if wished else policy.dry_run)
    outcomes: dict[str, int] = {}
    if policy.enabled or wished:
        outcomes = await _mend(context, database, services, policy, acts=acts, wished=wished)
    async with database.reading() as session:
        last_day = await recovery_log.numbers(session, now() - DAY)
    return {"enabled": policy.enabled, "dry_run": not acts, "outcomes": outcomes, "last_day": last_day}


async def _mend(
    context: Context, database: Database, services: Followed, policy: RecoveryPolicy, *, acts: bool, wished: bool
) -> dict[str, int]:
    """With `wished`, a person wants it now; what a dry run finds then changes nothing about what comes later."""
    noted: list[Recovery] = []
    if acts or not wished:
        async with database.reading() as session:
            begun = await recovery_log.unended(session, now())
        for recovery in begun:
            context.report(phase=f"what came of '{recovery.title}'")
            await carry_out(database, services, recovery, resumed=True)
    async with database.reading() as session:
        open_cases = await cases(session, policy, services, now(), early=wished)
    for row in open_cases[:CASES_AT_ONCE]:
        context.report(phase=f"'{row.title}'")
        if recovery := await _decide(context, database, services, row, acts=acts, settles=acts or not wished):
            noted.append(recovery)
    noted += await _decide_leftovers(context, database, services, acts=acts)
    todo = [recovery for recovery in noted if recovery.outcome == "begun"]
    for number, recovery in enumerate(todo):
        context.report(progress=100 * number / len(todo), phase=f"{recovery.decision} '{recovery.title}'")
        await carry_out(database, services, recovery, resumed=False)
    counted: dict[str, int] = {}
    for recovery in noted:
        context.log(f"{recovery.service}: '{recovery.title}': {recovery.decision}: {recovery.reason}")
        name = f"{recovery.decision}, {recovery.outcome}"
        counted[name] = counted.get(name, 0) + 1
    return counted


async def _decide(
    context: Context,
    database: Database,
    services: Followed,
    row: FollowedDownload,
    *,
    acts: bool,
    settles: bool,
) -> Recovery | None:
    """What is to be done about a download, written down; None: nothing that was not said before."""
    case, target = await _case(database, services, row)
    async with database.transaction() as session:
        await one_at_a_time(session, Recovery.__tablename__)
        policy, _ = await recovery_log.policy_of(session)
        at = now()
        past = await recovery_log.past_of(session, target.service.id, target.item, row.title, at)
        decision = decide(policy, case, past, at)
        if settles:
            await _settle(session, row, decision, policy, at)
        what = {"service_id": target.service.id, "service": target.service.name, "item": target.item}
        recovery = as_recovery(
            decision,
            policy,
            acts=acts,
            at=at,
            job_id=context.job_id,
            title=row.title,
            content=list(target.content),
            stood_at=target.bytes_left if case.state == "running" else None,
            **what,
        )
        return recovery if await recovery_log.note(session, recovery) else None


async def _settle(
    session: AsyncSession, judged: FollowedDownload, decision: Decision, policy: RecoveryPolicy, at: datetime
) -> None:
    """Until when there is nothing more to decide about this download, unless it has become another case meanwhile."""
    row = await session.get(FollowedDownload, judged.id, with_for_update=True)
    if row is None or (row.state, row.reason) != (judged.state, judged.reason):
        return
    if decision.verdict in ACTIONS:
        # If it does not help, the same download is a case again when the cooldown is over.
        row.decide_at = at + timedelta(minutes=max(policy.cooldown_minutes, 1))
        return
    row.decide_at = decision.again_at
    row.settled = decision.verdict != "wait"


async def _case(database: Database, services: Followed, row: FollowedDownload) -> tuple[Case, Target]:
    """All that is known of a download, and who could do something about it."""
    service, following = services[row.service_id]
    case = Case(row.state, row.strikes, row.moved_at, row.reason, tuple(row.tags))
    if following.replacing is not None:
        target = Target(service, row.item, tuple(row.content), row.bytes_left)
        return replace(case, chosen_by=service.name, replaced_by=service.name), target
    unsure = None
    for other, others in services.values():
        if others.replacing is None or row.download_id is None:
            continue
        try:
            async with service_store.connected(database, other) as client:
                queued = await others.replacing.find(client, row.download_id)
                grab = await others.replacing.grab_of(client, row.download_id)
        except (ServiceError, SealBroken):
            unsure = other.name
            continue
        if queued is None and grab is None:
            continue
        content = queued.content if queued else grab.content if grab else ()
        tags = queued.tags if queued else grab.tags if grab else ()
        said = [case.reason, queued.reason if queued else ""]
        known = replace(
            case,
            reason="; ".join(words for words in dict.fromkeys(said) if words),
            tags=(*case.tags, *tags),
            chosen_by=other.name,
            replaced_by=other.name if queued else None,
            is_marked=queued is not None or (grab is not None and (grab.failed or grab.imported)),
        )
        return known, Target(other, row.download_id, content, queued.bytes_left if queued else None)
    retried_by = service.name if following.retry else None
    return replace(case, retried_by=retried_by, unsure=unsure), Target(service, row.item)


async def _decide_leftovers(context: Context, database: Database, services: Followed, *, acts: bool) -> list[Recovery]:
    """What is to be done about folders that nobody knows any more."""
    noted: list[Recovery] = []
    for service, following in services.values():
        if following.finished is None:
            continue
        context.report(phase=f"leftover folders of {service.name}")
        try:
            async with service_store.connected(database, service) as client:
                finished = await following.finished(client)
        except (ServiceError, SealBroken) as error:
            context.log(f"{service.name}: its folders are not known: {error.message}", "WARNING")
            async with database.transaction() as session:
                await _note_looked(session, service, now())
            continue
        found = await asyncio.to_thread(_find_leftovers, context, service.name, finished)
        async with database.transaction() as session:
            await one_at_a_time(session, Recovery.__tablename__)
            policy, _ = await recovery_log.policy_of(session)
            at = now()
            await _note_looked(session, service, at)
            for leftover in found:
                past = await recovery_log.past_of(session, service.id, leftover.told_path, leftover.told_path, at)
                recovery = as_recovery(
                    _about_folder(policy, leftover, past, at),
                    policy,
                    acts=acts,
                    at=at,
                    job_id=context.job_id,
                    service_id=service.id,
                    service=service.name,
                    item=leftover.told_path,
                    title=leftover.path.name,
                )
                if await recovery_log.note(session, recovery):
                    noted.append(recovery)
    return noted


async def _note_looked(session: AsyncSession, service: Service, at: datetime) -> None:
    """So that nobody looks again within the hour, whether anything was to be seen or not."""
    if known := await session.get(FollowedService, service.id, with_for_update=True):
        known.leftovers_at = at


def _find_leftovers(context: Context, name: str, finished: Finished) -> list[orphans.Leftover]:
    try:
        return orphans.find(finished, get_settings().media.folders)
    except OSError as error:
        context.log(f"{name}: its folders cannot be read from here: {error}", "WARNING")
        return []


def _about_folder(policy: RecoveryPolicy, leftover: orphans.Leftover, past: Past, at: datetime) -> Decision:
    what = "a folder of a failed download that its service no longer knows"
    if policy.leftovers == "report":
        return Decision("report", what)
    if not leftover.may_go:
        return Decision("report", f"{what}; media.folders does not say that it is the service's own")
    if at - leftover.changed_at < timedelta(days=policy.leftover_days):
        return Decision("report", f"{what}; it goes when it is {policy.leftover_days:g} days old")
    if past.is_begun:
        return Decision("wait", "until it is known what came of the last time")
    if past.last_hour >= policy.max_per_hour:
        return Decision("wait", "to remove it: this hour has seen enough actions")
    return Decision("remove_folder", f"{what}, for more than {policy.leftover_days:g} days")
