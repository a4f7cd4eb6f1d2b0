"""Carry out the decision about a download, and record the outcome.

Each step first checks that it is still needed, and not done yet. So a step is not repeated if an earlier worker took it
and died.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from sqlalchemy import update

from cluster.db import Database, now
from cluster.secrets import SealBroken
from cluster.services import store as service_store
from cluster.services.capabilities.download_tracking import DownloadTracker, ReplacementActions
from cluster.services.capabilities.downloads import DownloadNotFailed, DownloadNotFound
from cluster.services.errors import ServiceError
from cluster.services.http.client import Client
from cluster.services.store import Service
from cluster.settings import get_settings
from pipelines.media.downloads import log as recovery_log
from pipelines.media.downloads import orphans
from pipelines.media.downloads.log import Recovery, RecoveryOutcome
from pipelines.media.downloads.policy import RecoveryPolicy, veto_reason
from pipelines.media.downloads.tables import FollowedDownload, tags_of

MAX_RETRY_AGE = timedelta(days=1)
RETRY_DELAY = timedelta(minutes=5)
MAX_CLOCK_SKEW = timedelta(minutes=2)
"""The maximum difference between the clock of a service and ours."""


@dataclass(frozen=True)
class ActionResult:
    outcome: RecoveryOutcome
    error: str | None = None
    new_item: str | None = None
    settles: bool = False  # whether nothing remains to be decided about the download


OVERTAKEN = ActionResult("overtaken", "The download has progressed or is gone.")


async def execute_recovery(
    database: Database, services: Mapping[int, tuple[Service, DownloadTracker]], recovery: Recovery, *, resumed: bool
) -> None:
    """Carry out a decision. With `resumed`, an earlier worker began it, and it is unknown how far it got."""
    async with database.read_transaction() as session:
        policy, _ = await recovery_log.current_policy(session)
        tags = await tags_of(session, recovery.item)
    service, tracker = services.get(recovery.service_id or 0, (None, None))
    if service is None or tracker is None:
        return await _give_up(database, recovery, "The service is no longer followed.")
    if service.connected_as_of > recovery.at:
        return await _give_up(database, recovery, "The address or the key of the service has changed since.")
    if not recovery.removed and (why := _policy_veto(policy, recovery) or veto_reason(policy, tags)):
        return await _give_up(database, recovery, why)
    try:
        async with service_store.open_client(database, service) as client:
            result = await _execute(database, client, tracker, policy, recovery, resumed=resumed)
    except (ServiceError, SealBroken) as error:
        if error.retryable and now() - recovery.at < MAX_RETRY_AGE:
            # The service may have done it: that is checked when it answers again.
            return await _update_recovery(database, recovery, error=error.message, again_at=now() + RETRY_DELAY)
        result = ActionResult("failed", error.message)
    except OSError as error:
        result = ActionResult("failed", f"{type(error).__name__}: {error}")
    await _finish_recovery(database, recovery, result)


def _policy_veto(policy: RecoveryPolicy, recovery: Recovery) -> str | None:
    """Why the current policy forbids a decision, if it does. Manual decisions do not need a policy that acts."""
    was_manual = recovery.policy["dry_run"] or not recovery.policy["enabled"]
    if not was_manual and (policy.dry_run or not policy.enabled):
        return "The policy has changed, and does not allow actions any more."
    if recovery.decision == "remove_folder" and policy.leftovers == "report":
        return "The policy has changed, and only reports such folders."
    return None


async def _execute(
    database: Database,
    client: Client,
    tracker: DownloadTracker,
    policy: RecoveryPolicy,
    recovery: Recovery,
    *,
    resumed: bool,
) -> ActionResult:
    if recovery.decision == "retry" and tracker.retry:
        return await _retry(client, tracker.retry, recovery, resumed=resumed)
    if recovery.decision == "remove_folder" and tracker.finished_folders:
        return await _remove_folder(client, tracker, recovery, resumed=resumed)
    if recovery.decision in {"replace", "mark_failed"} and tracker.replacement:
        return await _replace(database, client, tracker.replacement, policy, recovery, resumed=resumed)
    return ActionResult("overtaken", "The service can no longer do this.")


async def _retry(
    client: Client, retry: Callable[[Client, str], Awaitable[str]], recovery: Recovery, *, resumed: bool
) -> ActionResult:
    try:
        return ActionResult("done", new_item=await retry(client, recovery.item), settles=True)
    except (DownloadNotFound, DownloadNotFailed):
        return replace(_nothing_left(resumed=resumed), settles=True)


async def _replace(
    database: Database,
    client: Client,
    replacing: ReplacementActions,
    policy: RecoveryPolicy,
    recovery: Recovery,
    *,
    resumed: bool,
) -> ActionResult:
    """Remove a download, or mark it as failed; then make sure that another one is searched for."""
    should_search = bool(recovery.policy["search_again"])
    searches_itself = await replacing.searches_automatically(client)
    if not recovery.removed:
        if recovery.decision == "mark_failed":
            early_result = await _mark_failed(client, replacing, policy, recovery, resumed=resumed)
        else:
            search = should_search and searches_itself
            early_result = await _remove(client, replacing, policy, recovery, resumed=resumed, search=search)
        if early_result:
            return early_result
        await _update_recovery(database, recovery, removed=True)
    # Marking a grab as failed has no option for the search: a service that searches automatically then does so anyway.
    if not should_search or searches_itself:
        await _update_recovery(
            database, recovery, searched=searches_itself and (should_search or recovery.decision == "mark_failed")
        )
        return ActionResult("done")
    content = tuple(recovery.content)
    if not content:
        return ActionResult("done", "It is not known what to search for.")
    if not (resumed and await replacing.is_searching(client, content, recovery.at - MAX_CLOCK_SKEW)):
        await replacing.search(client, content)
    await _update_recovery(database, recovery, searched=True)
    return ActionResult("done")


async def _remove(
    client: Client,
    replacing: ReplacementActions,
    policy: RecoveryPolicy,
    recovery: Recovery,
    *,
    resumed: bool,
    search: bool,
) -> ActionResult | None:
    """Remove a download. None: it is removed, now or by an earlier worker."""
    download = await replacing.find(client, recovery.item)
    if download is None:
        # Our removal leaves a failure in the history. Without one, somebody else has probably removed it.
        grab = await replacing.find_grab(client, recovery.item)
        return None if resumed and grab and grab.failed and not grab.imported else OVERTAKEN
    is_stalled = recovery.stood_at is not None and download.bytes_left == recovery.stood_at
    if download.state not in {"failed", "blocked"} and not (is_stalled and download.state in {"running", "waiting"}):
        return OVERTAKEN
    if why := veto_reason(policy, download.tags, download.reason):
        return ActionResult("overtaken", why)
    return None if await replacing.remove(client, recovery.item, search) else OVERTAKEN


async def _mark_failed(
    client: Client, replacing: ReplacementActions, policy: RecoveryPolicy, recovery: Recovery, *, resumed: bool
) -> ActionResult | None:
    """Mark a download as failed. None: it is marked, now or by an earlier worker."""
    grab = await replacing.find_grab(client, recovery.item)
    if grab is None or grab.imported:
        return OVERTAKEN
    if grab.failed:
        return None if resumed else OVERTAKEN
    if why := veto_reason(policy, grab.tags):
        return ActionResult("overtaken", why)
    await replacing.mark_failed(client, grab.id)
    return None


async def _remove_folder(
    client: Client, tracker: DownloadTracker, recovery: Recovery, *, resumed: bool
) -> ActionResult:
    assert tracker.finished_folders
    finished = await tracker.finished_folders(client)
    found = await asyncio.to_thread(orphans.find, finished, get_settings().media.folders)
    leftover = next((one for one in found if one.service_path == recovery.item and one.is_removable), None)
    if leftover is None:
        return _nothing_left(resumed=resumed)
    await asyncio.to_thread(orphans.remove, leftover)
    return ActionResult("done")


def _nothing_left(*, resumed: bool) -> ActionResult:
    """The result when nothing remains to be done: an earlier worker has done it, or somebody else."""
    return ActionResult("done") if resumed else OVERTAKEN


async def _give_up(database: Database, recovery: Recovery, why: str) -> None:
    if recovery.removed:
        return await _finish_recovery(
            database, recovery, ActionResult("failed", f"It was removed, but no search was started: {why}")
        )
    await _finish_recovery(database, recovery, ActionResult("overtaken", why))


async def _finish_recovery(database: Database, recovery: Recovery, result: ActionResult) -> None:
    await _update_recovery(
        database,
        recovery,
        outcome=result.outcome,
        error=result.error,
        new_item=result.new_item,
        ended_at=now(),
        again_at=None,
    )
    if result.settles:
        retried = {"state": "retried", "ended_at": recovery.ended_at} if result.outcome == "done" else {}
        async with database.transaction() as session:
            await session.execute(
                update(FollowedDownload)
                .where(FollowedDownload.service_id == recovery.service_id, FollowedDownload.item == recovery.item)
                .values(settled=True, **retried)
            )


async def _update_recovery(database: Database, recovery: Recovery, **values: Any) -> None:
    """Store these values in the row, and in `recovery`, which is detached."""
    async with database.transaction() as session:
        row = await session.get_one(Recovery, recovery.id, with_for_update=True)
        for name, value in values.items():
            setattr(row, name, value)
            setattr(recovery, name, value)
