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

from cluster.db import Database, now, with_own_database
from cluster.errors import Conflict, ForgearrError, NotFound
from cluster.services import store as service_store
from cluster.services.capabilities.settings import SettingsAreas, SettingsEntry, settings_equal
from cluster.services.errors import CircuitOpen, NotFoundInService, Refused, ServiceError, Unreachable
from cluster.services.http.client import Client
from jobs.context import Context
from jobs.registry import job
from jobs.tables import Job
from pipelines.media.audit import rules
from pipelines.media.audit import tables as audit_tables
from pipelines.media.audit.audit_services import read_areas
from pipelines.media.audit.evaluate import evaluate_rules, to_storable
from pipelines.media.audit.tables import ChangeOutcome, Recommendation, SettingChange, is_open, last_change

KIND = "change_settings"
MAX_RECOMMENDATIONS = 100
CONNECTION_ERROR = "mcp_connection_error"
"""The word for a service that cannot be reached, in the dialect of those who ask for changes."""


class ManualOnly(Conflict):
    """This needs somebody's judgement, and is done by hand."""

    error = "by_hand"


class SettingChanged(Conflict):
    """The setting was changed since."""

    error = "changed_since"


class ValueNotAccepted(Conflict):
    """The service did not take the value."""

    error = "not_taken"


class NothingToRestore(Conflict):
    """Nothing was changed because of this recommendation, or it was taken back already."""


class ChangeSpec(BaseModel):
    """Which recommendations to apply, or to take back."""

    model_config = ConfigDict(extra="forbid")

    action: Literal["apply", "restore"]
    recommendation_ids: list[int] = Field(min_length=1, max_length=MAX_RECOMMENDATIONS)
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
class LiveSetting:
    """The setting that a recommendation is about, where it is now."""

    client: Client
    areas: SettingsAreas
    row: Recommendation
    entry: SettingsEntry

    @property
    def value(self) -> Any:
        return self.entry.values[self.row.setting]

    async def reread(self) -> "LiveSetting":
        return replace(self, entry=await _read_entry(self.client, self.areas, self.row))

    async def write(self, value: Any) -> "LiveSetting":
        """Write a value; returns what is there then."""
        await self.areas.write(self.client, self.row.area, self.entry, {self.row.setting: value})
        return await self.reread()


@job(KIND, spec=ChangeSpec, admin_only=True, concurrency=1, tracked=True)
def change_settings(context: Context, spec: ChangeSpec) -> dict[str, Any]:
    """Applies recommendations to services, or takes them back, one after the other."""
    return asyncio.run(with_own_database(lambda database: _change_all(context, spec, database)))


async def _change_all(context: Context, spec: ChangeSpec, database: Database) -> dict[str, Any]:
    async with database.read_transaction() as session:
        own_job = await session.get(Job, context.job_id)
    by, requested_at = (own_job.created_by, own_job.created_at) if own_job else ("local", now())
    recommendation_ids = list(dict.fromkeys(spec.recommendation_ids))
    results: list[ItemResult] = []
    unreachable: dict[int, ServiceError] = {}  # nobody waits for the same silence twice
    for number, recommendation_id in enumerate(recommendation_ids, 1):
        context.report(
            progress=100 * (number - 1) / len(recommendation_ids), phase=f"{number} of {len(recommendation_ids)}"
        )
        results.append(await _change_one(database, recommendation_id, spec, by, requested_at, unreachable))
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


async def _change_one(
    database: Database,
    recommendation_id: int,
    spec: ChangeSpec,
    by: str,
    requested_at: datetime,
    unreachable: dict[int, ServiceError],
) -> ItemResult:
    result = ItemResult(recommendation_id=recommendation_id, success=False, message="")
    service_id: int | None = None
    try:
        async with database.read_transaction() as session:
            row = await audit_tables.get(session, recommendation_id)
            service = await service_store.get(session, row.service_id)
        service_id, result.service, result.setting_name = row.service_id, service.name, row.setting
        settings = service.connector.settings
        if spec.action == "apply" and (row.by_hand is not None or settings is None):
            raise ManualOnly(f"This is done by hand: {row.by_hand}")
        if settings is None:
            raise NothingToRestore
        if row.service_id in unreachable:
            raise unreachable[row.service_id]
        async with service_store.open_client(database, service) as client:
            setting = LiveSetting(client, settings, row, await _read_entry(client, settings, row))
            result.previous_value, _ = to_storable(setting.value)
            if spec.action == "apply":
                await _apply(database, setting, result, by, dry_run=spec.dry_run)
            else:
                await _restore(database, setting, result, by, requested_at, dry_run=spec.dry_run)
        result.success = True
    except ForgearrError as error:
        if isinstance(error, Unreachable | CircuitOpen) and service_id is not None:
            unreachable[service_id] = error
        result.error = CONNECTION_ERROR if isinstance(error, ServiceError) and error.status == 503 else error.error
        failed = "Service connection failed: " if result.error == CONNECTION_ERROR else ""
        result.message = f"{failed}{error.message}"
    return result


async def _read_entry(client: Client, areas: SettingsAreas, row: Recommendation) -> SettingsEntry:
    entries = {entry.key: entry for entry in await areas.read(client, row.area)}
    entry = entries.get(row.entry)
    if entry is None or row.setting not in entry.values:
        raise NotFound(f"{client.connection.name} has no '{row.setting}' of '{row.entry_name or row.area}' any more.")
    return entry


async def _apply(database: Database, setting: LiveSetting, result: ItemResult, by: str, *, dry_run: bool) -> None:
    row, recommended = setting.row, setting.row.recommended_value
    result.new_value = recommended
    if settings_equal(setting.value, recommended):
        result.message = "It is so already; nothing was changed"
        result.rollback_available = await _record_already_set(database, row, by, dry_run=dry_run)
        return
    if row.applied_at is not None:
        raise SettingChanged(f"It was applied before, and is {setting.value!r} now: somebody has changed it since.")
    if row.closed_at is not None:
        raise SettingChanged("The last audit has not found it any more; audit again.")
    if not settings_equal(setting.value, row.current_value):
        raise SettingChanged(
            f"It is {result.previous_value!r} now, and was {row.current_value!r} in the audit: somebody has changed it "
            "since. Nothing was overwritten; audit again."
        )
    setting = await _confirm_finding(setting)
    if dry_run:
        result.message = "It would be changed"
        return
    change = await _start_change(database, row, result.previous_value, recommended, by)
    result.changed = True
    try:
        after = await setting.write(recommended)
    except (Refused, NotFoundInService):
        await _finish_change(database, change.id, "failed")
        raise
    if not settings_equal(after.value, recommended):
        if not settings_equal(after.value, change.previous):
            await _record_actual_value(database, change.id, to_storable(after.value)[0])
        is_reverted, message = await _revert(after, change.previous)
        if is_reverted:
            await _finish_change(database, change.id, "failed")
        raise ValueNotAccepted(message)
    await _finish_change(database, change.id, "applied")
    result.message, result.rollback_available = "Configuration applied successfully", True


async def _confirm_finding(setting: LiveSetting) -> LiveSetting:
    """The setting, just read, if an audit would find the same: other settings count too, and another thing may have its
    key by now."""
    row, rule_set = setting.row, await asyncio.to_thread(rules.load)
    relevant_rules = [rule for rule in rule_set.rules if rule.id == row.rule_id]
    by_area = await read_areas(setting.client, setting.areas, relevant_rules)
    for finding in evaluate_rules(relevant_rules, by_area):
        if (finding.entry, finding.entry_name) == (row.entry, row.entry_name) and settings_equal(
            finding.current, row.current_value
        ):
            return replace(setting, entry=next(entry for entry in by_area[row.area] if entry.key == row.entry))
    raise SettingChanged("What the audit has found there is no longer so. Nothing was changed; audit again.")


async def _restore(
    database: Database, setting: LiveSetting, result: ItemResult, by: str, requested_at: datetime, *, dry_run: bool
) -> None:
    async with database.transaction() as session:
        change = await last_change(session, setting.row.id, "applied", "begun", "restored")
    if change is None or (change.restored_at and change.restored_at < requested_at):
        raise NothingToRestore
    result.new_value = change.previous
    if change.restored_at:  # since this was asked for: by an attempt that was lost, or by another job
        if not settings_equal(setting.value, change.previous):
            raise NothingToRestore
        result.message = "It is so already"
        return
    if not settings_equal(setting.value, change.previous):
        if not settings_equal(setting.value, change.new):
            raise SettingChanged(
                f"It is {result.previous_value!r} now, and was set to {change.new!r}: somebody has changed it since. "
                "Nothing was overwritten."
            )
        if dry_run:
            result.message = "It would be given its former value back"
            return
        result.changed = True
        after = await setting.write(change.previous)
        if not settings_equal(after.value, change.previous):
            raise ValueNotAccepted(
                f"It did not take its former value back, and is {to_storable(after.value)[0]!r} now."
            )
    if not dry_run:
        await _finish_change(database, change.id, "restored", by)
    result.message = "Configuration restored successfully" if result.changed else "It is so already"


async def _revert(setting: LiveSetting, previous: Any) -> tuple[bool, str]:
    """Give what has become something else its former value back; whether it has that now, and what to say of it."""
    written, _ = to_storable(setting.value)
    if settings_equal(setting.value, previous):
        return True, f"It was written, and is still {written!r}: the service does not take the recommended value."
    try:
        reverted = await setting.write(previous)
    except ServiceError as error:
        return (
            False,
            f"It was written, and is {written!r} now; its former value could not be given back: {error.message}",
        )
    if not settings_equal(reverted.value, previous):
        return (
            False,
            f"It was written, and is {to_storable(reverted.value)[0]!r} now; its former value was not taken back.",
        )
    return True, f"It was written, and became {written!r}: it was given its former value back."


async def _record_already_set(database: Database, row: Recommendation, by: str, *, dry_run: bool) -> bool:
    """Write down what is so already; returns whether it was us who set it."""
    if dry_run:
        return row.applied_at is not None
    async with database.transaction() as session:
        change = await last_change(session, row.id, "applied", "begun")
    if change is None:
        async with database.transaction() as session:
            recommendation = await audit_tables.get(session, row.id, lock=True)
            recommendation.closed_at = recommendation.closed_at or now()
        return False
    if change.outcome == "begun":
        await _finish_change(database, change.id, "applied")
    return True


async def _start_change(database: Database, row: Recommendation, previous: Any, new: Any, by: str) -> SettingChange:
    async with database.transaction() as session:
        change = SettingChange(recommendation_id=row.id, previous=previous, new=new, outcome="begun", by=by)
        session.add(change)
    return change


async def _record_actual_value(database: Database, change_id: int, actual: Any) -> None:
    """A value that nobody wanted: whoever takes the change back finds this one."""
    async with database.transaction() as session:
        if change := await session.get(SettingChange, change_id, with_for_update=True):
            change.new = actual


async def _finish_change(database: Database, change_id: int, outcome: ChangeOutcome, by: str = "") -> None:
    """What has become of a change, and so of its recommendation."""
    async with database.transaction() as session:
        change = await session.get(SettingChange, change_id, with_for_update=True)
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
            open_duplicate = select(Recommendation.id).where(
                Recommendation.service_id == row.service_id,
                Recommendation.rule_id == row.rule_id,
                Recommendation.entry == row.entry,
                is_open(),
            )
            row.closed_at = row.closed_at if await session.scalar(open_duplicate) else None
