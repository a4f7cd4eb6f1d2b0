"""Carries out what was decided about a download, and writes down what came of it.

Before each step it looks whether there is still, or yet, something to do; so a step that an earlier worker has taken
before it died is not taken again.
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
from cluster.services.capabilities.download_tracking import Following, Replacing
from cluster.services.capabilities.downloads import DownloadNotFailed, DownloadNotFound
from cluster.services.errors import ServiceError
from cluster.services.http.client import Client
from cluster.services.store import Service
from cluster.settings import get_settings
from pipelines.media.downloads import log as recovery_log
from pipelines.media.downloads import orphans
from pipelines.media.downloads.log import Recovery, RecoveryOutcome
from pipelines.media.downloads.policy import RecoveryPolicy, forbidden
from pipelines.media.downloads.tables import FollowedDownload, tags_of

PATIENCE = timedelta(days=1)
AGAIN = timedelta(minutes=5)
SKEW = timedelta(minutes=2)
"""How far the clock of a service may be from ours."""


@dataclass(frozen=True)
class Ending:
    outcome: RecoveryOutcome
    error: str | None = None
    new_item: str | None = None
    settles: bool = False  # whether there is nothing more to decide about the download


OVERTAKEN = Ending("overtaken", "It has got on, or is gone.")


async def carry_out(
    database: Database, services: Mapping[int, tuple[Service, Following]], recovery: Recovery, *, resumed: bool
) -> None:
    """Do what was decided. With `resumed`, somebody has begun to, and nobody knows how far that went."""
    async with database.reading() as session:
        policy, _ = await recovery_log.policy_of(session)
        tags = await tags_of(session, recovery.item)
    service, following = services.get(recovery.service_id or 0, (None, None))
    if service is None or following is None:
        return await _give_up(database, recovery, "The service is no longer followed.")
    if service.connected_as_of > recovery.at:
        return await _give_up(database, recovery, "The service has another address or key since.")
    if not recovery.removed and (why := _stopped(policy, recovery) or forbidden(policy, tags)):
        return await _give_up(database, recovery, why)
    try:
        async with service_store.connected(database, service) as client:
            ending = await _act(database, client, following, policy, recovery, resumed=resumed)
    except (ServiceError, SealBroken) as error:
        if error.retryable and now() - recovery.at < PATIENCE:
            # Whether the service has done it will show when it answers again.
            return await _note(database, recovery, error=error.message, again_at=now() + AGAIN)
        ending = Ending("failed", error.message)
    except OSError as error:
        ending = Ending("failed", f"{type(error).__name__}: {error}")
    await _end(database, recovery, ending)


def _stopped(policy: RecoveryPolicy, recovery: Recovery) -> str | None:
    """Why this is not done any more, though it was decided. What a person has wished for needs no policy that acts."""
    was_wished = recovery.policy["dry_run"] or not recovery.policy["enabled"]
    if not was_wished and (policy.dry_run or not policy.enabled):
        return "The policy has changed, and does not act any more."
    if recovery.decision == "remove_folder" and policy.leftovers == "report":
        return "The policy has changed, and only reports such folders."
    return None


async def _act(
    database: Database,
    client: Client,
    following: Following,
    policy: RecoveryPolicy,
    recovery: Recovery,
    *,
    resumed: bool,
) -> Ending:
    if recovery.decision == "retry" and following.retry:
        return await _retry(client, following.retry, recovery, resumed=resumed)
    if recovery.decision == "remove_folder" and following.finished:
        return await _remove_folder(client, following, recovery, resumed=resumed)
    if recovery.decision in {"replace", "mark_failed"} and following.replacing:
        return await _replace(database, client, following.replacing, policy, recovery, resumed=resumed)
    return Ending("overtaken", "The service can no longer do this.")


async def _retry(
    client: Client, retry: Callable[[Client, str], Awaitable[str]], recovery: Recovery, *, resumed: bool
) -> Ending:
    try:
        return Ending("done", new_item=await retry(client, recovery.item), settles=True)
    except (DownloadNotFound, DownloadNotFailed):
        return replace(_gone(resumed=resumed), settles=True)


async def _replace(
    database: Database,
    client: Client,
    replacing: Replacing,
    policy: RecoveryPolicy,
    recovery: Recovery,
    *,
    resumed: bool,
) -> Ending:
    """Remove a download, or mark it as failed; then see to it that another one is searched for."""
    wants_search = bool(recovery.policy["search_again"])
    by_itself = await replacing.searches_itself(client)
    if not recovery.removed:
        if recovery.decision == "mark_failed":
            overtaken = await _mark(client, replacing, policy, recovery, resumed=resumed)
        else:
            search = wants_search and by_itself
            overtaken = await _remove(client, replacing, policy, recovery, resumed=resumed, search=search)
        if overtaken:
            return overtaken
        await _note(database, recovery, removed=True)
    # A grab that is marked as failed has no wish with it: whoever searches by itself does so.
    if not wants_search or by_itself:
        await _note(database, recovery, searched=by_itself and (wants_search or recovery.decision == "mark_failed"))
        return Ending("done")
    content = tuple(recovery.content)
    if not content:
        return Ending("done", "It is not known what to search for.")
    if not (resumed and await replacing.is_searching(client, content, recovery.at - SKEW)):
        await replacing.search(client, content)
    await _note(database, recovery, searched=True)
    return Ending("done")


async def _remove(
    client: Client, replacing: Replacing, policy: RecoveryPolicy, recovery: Recovery, *, resumed: bool, search: bool
) -> Ending | None:
    """None: it is removed, if not now, then by a worker before."""
    found = await replacing.find(client, recovery.item)
    if found is None:
        # Our removal leaves a failure in the history; without one it was somebody else, as far as can be told.
        grab = await replacing.grab_of(client, recovery.item)
        return None if resumed and grab and grab.failed and not grab.imported else OVERTAKEN
    stands_still = recovery.stood_at is not None and found.bytes_left == recovery.stood_at
    if found.state not in {"failed", "blocked"} and not (stands_still and found.state in {"running", "waiting"}):
        return OVERTAKEN
    if why := forbidden(policy, found.tags, found.reason):
        return Ending("overtaken", why)
    return None if await replacing.remove(client, recovery.item, search) else OVERTAKEN


async def _mark(
    client: Client, replacing: Replacing, policy: RecoveryPolicy, recovery: Recovery, *, resumed: bool
) -> Ending | None:
    """None: it is marked as failed, if not now, then by a worker before."""
    grab = await replacing.grab_of(client, recovery.item)
    if grab is None or grab.imported:
        return OVERTAKEN
    if grab.failed:
        return None if resumed else OVERTAKEN
    if why := forbidden(policy, grab.tags):
        return Ending("overtaken", why)
    await replacing.mark_failed(client, grab.id)
    return None


async def _remove_folder(client: Client, following: Following, recovery: Recovery, *, resumed: bool) -> Ending:
    assert following.finished
    finished = await following.finished(client)
    found = await asyncio.to_thread(orphans.find, finished, get_settings().media.folders)
    leftover = next((one for one in found if one.told_path == recovery.item and one.may_go), None)
    if leftover is None:
        return _gone(resumed=resumed)
    await asyncio.to_thread(orphans.remove, leftover)
    return Ending("done")


def _gone(*, resumed: bool) -> Ending:
    """There is nothing left to do: somebody was faster, or it was us."""
    return Ending("done") if resumed else OVERTAKEN


async def _give_up(database: Database, recovery: Recovery, why: str) -> None:
    if recovery.removed:
        return await _end(database, recovery, Ending("failed", f"It was removed, and nothing was searched for: {why}"))
    await _end(database, recovery, Ending("overtaken", why))


async def _end(database: Database, recovery: Recovery, ending: Ending) -> None:
    await _note(
        database,
        recovery,
        outcome=ending.outcome,
        error=ending.error,
        new_item=ending.new_item,
        ended_at=now(),
        again_at=None,
    )
    if ending.settles:
        retried = {"state": "retried", "ended_at": recovery.ended_at} if ending.outcome == "done" else {}
        async with database.transaction() as session:
            await session.execute(
                update(FollowedDownload)
                .where(FollowedDownload.service_id == recovery.service_id, FollowedDownload.item == recovery.item)
                .values(settled=True, **retried)
            )


async def _note(database: Database, recovery: Recovery, **values: Any) -> None:
    """Write this down, and have `recovery` say it too."""
    async with database.transaction() as session:
        row = await session.get_one(Recovery, recovery.id, with_for_update=True)
        for name, value in values.items():
            setattr(row, name, value)
            setattr(recovery, name, value)
