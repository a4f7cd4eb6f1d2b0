"""Kind `change_settings`: sets what recommendations recommend, and takes it back.

One such job runs at a time, so whatever is asked at once is done one after the other. Each setting is read, compared
with what the audit has found, written, and read again; what somebody has changed since is not overwritten. A change is
kept before it is made, so that it can be taken back even if nobody has heard how it ended.
"""

import asyncio
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select

from cluster.db import Database, apart, now
from cluster.errors import Conflict, ForgearrError, NotFound
from cluster.services import store as service_store
from cluster.services.capabilities.settings import Areas, Entry, same
from cluster.services.errors import CircuitOpen, NotThere, Refused, ServiceError, Unreachable
from cluster.services.http.client import Client
from jobs.context import Context
from jobs.registry import job
from jobs.tables import Job
from pipelines.media.audit import rules
from pipelines.media.audit import tables as audit_tables
from pipelines.media.audit.audit_services import read_areas
from pipelines.media.audit.evaluate import find, keepable
from pipelines.media.audit.tables import Change, Outcome, Recommendation, is_open, last_change

KIND = "change_settings"
IDS_MAX = 100
NOT_CONNECTED = "mcp_connection_error"
"""The word for a service that cannot be reached, in the dialect of those who ask for changes."""


class ByHand(Conflict):
    """This needs somebody's judgement, and is done by hand."""

    error = "by_hand"


class ChangedSince(Conflict):
    """The setting was changed since."""

    error = "changed_since"


class NotTaken(Conflict):
    """The service did not take the value."""

    error = "not_taken"


class NothingToRestore(Conflict):
    """Nothing was changed because of this recommendation, or it was taken back already."""


class ChangeSpec(BaseModel):
    """Which recommendations to apply, or to take back."""

    model_config = ConfigDict(extra="forbid")

    action: Literal["apply", "restore"]
    recommendation_ids: list[int] = Field(min_length=1, max_length=IDS_MAX)
    dry_run: bool = False


class ItemResult(BaseModel):
    """What has come of one recommendation."""

    recommendation_id: int
    success: bool
    message: str
    service: str | None = Field(default=None, description="The name of the service.")
    setting_name: str | None = None
    changed: bool = Field(default=False, description="Whether the service was told something.")
    previous_value: Any = None
    new_value: Any = None
    rollback_available: bool = False
    error: str | None = Field(default=None, description="Why not, as a word.")


@dataclass(frozen=True)
class Place:
    """The setting that a recommendation is about, where it is now."""

    client: Client
    areas: Areas
    row: Recommendation
    entry: Entry

    @property
    def live(self) -> Any:
        return self.entry.values[self.row.setting]

    async def again(self) -> "Place":
        return replace(self, entry=await _entry(self.client, self.areas, self.row))

    async def set(self, value: Any) -> "Place":
        """Write a value; returns what is there then."""
        await self.areas.write(self.client, self.row.area, self.entry, {self.row.setting: value})
        return await self.again()


@job(KIND, spec=ChangeSpec, admin_only=True, concurrency=1, tracked=True)
def change_settings(context: Context, spec: ChangeSpec) -> dict[str, Any]:
    """Applies recommendations to services, or takes them back, one after the other."""
    return asyncio.run(apart(lambda database: _change_all(context, spec, database)))


async def _change_all(context: Context, spec: ChangeSpec, database: Database) -> dict[str, Any]:
    async with database.reading() as session:
        asking = await session.get(Job, context.job_id)
    by, since = (asking.created_by, asking.created_at) if asking else ("local", now())
    wanted = list(dict.fromkeys(spec.recommendation_ids))
    results: list[ItemResult] = []
    away: dict[int, ServiceError] = {}  # nobody waits for the same silence twice
    for number, recommendation_id in enumerate(wanted, 1):
        context.report(progress=100 * (number - 1) / len(wanted), phase=f"{number} of {len(wanted)}")
        results.append(await _one(database, recommendation_id, spec, by, since, away))
    successful = sum(result.success for result in results)
    changed = 0 if spec.dry_run else sum(result.changed and result.success for result in results)
    context.report(
        progress=100,
        phase="done",
        applied=changed if spec.action == "apply" else 0,
        restored=changed if spec.action == "restore" else 0,
        failed=len(results) - successful,
    )
    return {
        "results": [result.model_dump() for result in results],
        "summary": {"total": len(results), "successful": successful, "failed": len(results) - successful},
        "dry_run": spec.dry_run,
    }


async def _one(
    database: Database,
    recommendation_id: int,
    spec: ChangeSpec,
    by: str,
    since: datetime,
    away: dict[int, ServiceError],
) -> ItemResult:
    result = ItemResult(recommendation_id=recommendation_id, success=False, message="")
    service_id: int | None = None
    try:
        async with database.reading() as session:
            row = await audit_tables.get(session, recommendation_id)
            service = await service_store.get(session, row.service_id)
        service_id, result.service, result.setting_name = row.service_id, service.name, row.setting
        settings = service.connector.settings
        if spec.action == "apply" and (row.by_hand is not None or settings is None):
            raise ByHand(f"This is done by hand: {row.by_hand}")
        if settings is None:
            raise NothingToRestore
        if row.service_id in away:
            raise away[row.service_id]
        async with service_store.connected(database, service) as client:
            place = Place(client, settings, row, await _entry(client, settings, row))
            result.previous_value, _ = keepable(place.live)
            if spec.action == "apply":
                await _apply(database, place, result, by, dry_run=spec.dry_run)
            else:
                await _restore(database, place, result, by, since, dry_run=spec.dry_run)
        result.success = True
    except ForgearrError as error:
        if isinstance(error, Unreachable | CircuitOpen) and service_id is not None:
            away[service_id] = error
        result.error = NOT_CONNECTED if isinstance(error, ServiceError) and error.status == 503 else error.error
        failed = "Service connection failed: " if result.error == NOT_CONNECTED else ""
        result.message = f"{failed}{error.message}"
    return result


async def _entry(client: Client, areas: Areas, row: Recommendation) -> Entry:
    entries = {entry.key: entry for entry in await areas.read(client, row.area)}
    entry = entries.get(row.entry)
    if entry is None or row.setting not in entry.values:
        raise NotFound(f"{client.connection.name} has no '{row.setting}' of '{row.entry_name or row.area}' any more.")
    return entry


async def _apply(database: Database, place: Place, result: ItemResult, by: str, *, dry_run: bool) -> None:
    row, wanted = place.row, place.row.recommended_value
    result.new_value = wanted
    if same(place.live, wanted):
        result.message = "It is so already; nothing was changed"
        result.rollback_available = await _settle(database, row, by, dry_run=dry_run)
        return
    if row.applied_at is not None:
        raise ChangedSince(f"It was applied before, and is {place.live!r} now: somebody has changed it since.")
    if row.closed_at is not None:
        raise ChangedSince("The last audit has not found it any more; audit again.")
    if not same(place.live, row.current_value):
        raise ChangedSince(
            f"It is {result.previous_value!r} now, and was {row.current_value!r} in the audit: somebody has changed it "
            "since. Nothing was overwritten; audit again."
        )
    place = await _found_again(place)
    if dry_run:
        result.message = "It would be changed"
        return
    change = await _begin(database, row, result.previous_value, wanted, by)
    result.changed = True
    try:
        after = await place.set(wanted)
    except (Refused, NotThere):
        await _end(database, change.id, "failed")
        raise
    if not same(after.live, wanted):
        if not same(after.live, change.previous):
            await _became(database, change.id, keepable(after.live)[0])
        is_back, said = await _given_back(after, change.previous)
        if is_back:
            await _end(database, change.id, "failed")
        raise NotTaken(said)
    await _end(database, change.id, "applied")
    result.message, result.rollback_available = "Configuration applied successfully", True


async def _found_again(place: Place) -> Place:
    """The setting, just read, if an audit would find the same: other settings count too, and another thing may have its
    key by now."""
    row, known = place.row, await asyncio.to_thread(rules.load)
    concerned = [rule for rule in known.rules if rule.id == row.rule_id]
    read = await read_areas(place.client, place.areas, concerned)
    for one in find(concerned, read):
        if (one.entry, one.entry_name) == (row.entry, row.entry_name) and same(one.current, row.current_value):
            return replace(place, entry=next(entry for entry in read[row.area] if entry.key == row.entry))
    raise ChangedSince("What the audit has found there is no longer so. Nothing was changed; audit again.")


async def _restore(
    database: Database, place: Place, result: ItemResult, by: str, since: datetime, *, dry_run: bool
) -> None:
    async with database.transaction() as session:
        change = await last_change(session, place.row.id, "applied", "begun", "restored")
    if change is None or (change.restored_at and change.restored_at < since):
        raise NothingToRestore
    result.new_value = change.previous
    if change.restored_at:  # since this was asked for: by an attempt that was lost, or by another job
        if not same(place.live, change.previous):
            raise NothingToRestore
        result.message = "It is so already"
        return
    if not same(place.live, change.previous):
        if not same(place.live, change.new):
            raise ChangedSince(
                f"It is {result.previous_value!r} now, and was set to {change.new!r}: somebody has changed it since. "
                "Nothing was overwritten."
            )
        if dry_run:
            result.message = "It would be given its former value back"
            return
        result.changed = True
        after = await place.set(change.previous)
        if not same(after.live, change.previous):
            raise NotTaken(f"It did not take its former value back, and is {keepable(after.live)[0]!r} now.")
    if not dry_run:
        await _end(database, change.id, "restored", by)
    result.message = "Configuration restored successfully" if result.changed else "It is so already"


async def _given_back(place: Place, previous: Any) -> tuple[bool, str]:
    """Give what has become something else its former value back; whether it has that now, and what to say of it."""
    found, _ = keepable(place.live)
    if same(place.live, previous):
        return True, f"It was written, and is still {found!r}: the service does not take the recommended value."
    try:
        back = await place.set(previous)
    except ServiceError as error:
        return False, f"It was written, and is {found!r} now; its former value could not be given back: {error.message}"
    if not same(back.live, previous):
        return False, f"It was written, and is {keepable(back.live)[0]!r} now; its former value was not taken back."
    return True, f"It was written, and became {found!r}: it was given its former value back."


async def _settle(database: Database, row: Recommendation, by: str, *, dry_run: bool) -> bool:
    """Write down what is so already; returns whether it was us who set it."""
    if dry_run:
        return row.applied_at is not None
    async with database.transaction() as session:
        change = await last_change(session, row.id, "applied", "begun")
    if change is None:
        async with database.transaction() as session:
            found = await audit_tables.get(session, row.id, lock=True)
            found.closed_at = found.closed_at or now()
        return False
    if change.outcome == "begun":
        await _end(database, change.id, "applied")
    return True


async def _begin(database: Database, row: Recommendation, previous: Any, new: Any, by: str) -> Change:
    async with database.transaction() as session:
        change = Change(recommendation_id=row.id, previous=previous, new=new, outcome="begun", by=by)
        session.add(change)
    return change


async def _became(database: Database, change_id: int, found: Any) -> None:
    """A value that nobody wanted: whoever takes the change back finds this one."""
    async with database.transaction() as session:
        if change := await session.get(Change, change_id, with_for_update=True):
            change.new = found


async def _end(database: Database, change_id: int, outcome: Outcome, by: str = "") -> None:
    """What has become of a change, and so of its recommendation."""
    async with database.transaction() as session:
        change = await session.get(Change, change_id, with_for_update=True)
        if change is None:
            return  # its service was deleted meanwhile
        change.outcome = outcome
        row = await audit_tables.get(session, change.recommendation_id, lock=True)
        if outcome == "applied":
            row.applied_at, row.applied_by = now(), change.by
            row.closed_at = row.applied_at
        if outcome == "restored":
            change.restored_at, change.restored_by = now(), by
            row.applied_at = row.applied_by = None
            again = select(Recommendation.id).where(
                Recommendation.service_id == row.service_id,
                Recommendation.rule_id == row.rule_id,
                Recommendation.entry == row.entry,
                is_open(),
            )
            row.closed_at = row.closed_at if await session.scalar(again) else None
