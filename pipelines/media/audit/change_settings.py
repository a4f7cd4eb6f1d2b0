"""The kind `change_settings`: apply recommendations to the settings of services, and roll them back.

One such job runs at a time. Each setting is read, compared with the finding of the audit, written, and read again. A
setting that was changed since the audit is not overwritten. A change is stored before it is made, so that it can be
rolled back even if its worker died.
"""

import asyncio
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select

from cluster.db import Database, now, run_with_database
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
"""The public error code for a service that cannot be reached."""


class ManualOnly(Conflict):
    """This needs a person's judgement, and must be done by hand."""

    error = "by_hand"


class SettingChanged(Conflict):
    """The setting has changed since the audit."""

    error = "changed_since"


class ValueNotAccepted(Conflict):
    """The service did not accept the value."""

    error = "not_taken"


class NothingToRestore(Conflict):
    """This recommendation was not applied, or it was already rolled back."""


class ChangeSpec(BaseModel):
    """The recommendations to apply or to roll back."""

    model_config = ConfigDict(extra="forbid")

    action: Literal["apply", "restore"]
    recommendation_ids: list[int] = Field(min_length=1, max_length=MAX_RECOMMENDATIONS)
    dry_run: bool = False


class ItemResult(BaseModel):
    """The result for one recommendation."""

    recommendation_id: int
    success: bool
    message: str
    service: str | None = Field(default=None, description="The name of the service.")
    setting_name: str | None = None
    changed: bool = Field(default=False, description="Whether something was written to the service.")
    previous_value: Any = None
    new_value: Any = None
    rollback_available: bool = False
    error: str | None = Field(default=None, description="The error code, if it failed.")


@dataclass(frozen=True)
class LiveSetting:
    """The setting of a recommendation, as it was just read from the service."""

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
        """Write a value, and read the setting again."""
        await self.areas.write(self.client, self.row.area, self.entry, {self.row.setting: value})
        return await self.reread()


@job(KIND, spec=ChangeSpec, admin_only=True, concurrency=1, tracked=True)
def change_settings(context: Context, spec: ChangeSpec) -> dict[str, Any]:
    """Applies recommendations to services, or rolls them back, one after the other."""
    return run_with_database(lambda database: _change_all(context, spec, database))


async def _change_all(context: Context, spec: ChangeSpec, database: Database) -> dict[str, Any]:
    async with database.read_transaction() as session:
        own_job = await session.get(Job, context.job_id)
    by, requested_at = (own_job.created_by, own_job.created_at) if own_job else ("local", now())
    recommendation_ids = list(dict.fromkeys(spec.recommendation_ids))
    results: list[ItemResult] = []
    unreachable: dict[int, ServiceError] = {}  # a service that does not answer is tried only once
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
            raise ManualOnly(f"Must be done by hand: {row.by_hand}")
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
        raise NotFound(f"{client.connection.name} no longer has '{row.setting}' in '{row.entry_name or row.area}'.")
    return entry


async def _apply(database: Database, setting: LiveSetting, result: ItemResult, by: str, *, dry_run: bool) -> None:
    row, recommended = setting.row, setting.row.recommended_value
    result.new_value = recommended
    if settings_equal(setting.value, recommended):
        result.message = "The value is already set; nothing was changed"
        result.rollback_available = await _record_already_set(database, row, by, dry_run=dry_run)
        return
    if row.applied_at is not None:
        raise SettingChanged(f"It was applied before, and was changed since: the value is {setting.value!r} now.")
    if row.closed_at is not None:
        raise SettingChanged("The last audit did not find it any more. Audit again.")
    if not settings_equal(setting.value, row.current_value):
        raise SettingChanged(
            f"The value is {result.previous_value!r}, and was {row.current_value!r} in the audit: it was changed "
            "since. Nothing was overwritten. Audit again."
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
    """Read the setting again, and check that an audit would still find it.

    Other settings may affect the rule too, and another item may have the same key by now.
    """
    row, rule_set = setting.row, await asyncio.to_thread(rules.load)
    relevant_rules = [rule for rule in rule_set.rules if rule.id == row.rule_id]
    by_area = await read_areas(setting.client, setting.areas, relevant_rules)
    for finding in evaluate_rules(relevant_rules, by_area):
        if (finding.entry, finding.entry_name) == (row.entry, row.entry_name) and settings_equal(
            finding.current, row.current_value
        ):
            return replace(setting, entry=next(entry for entry in by_area[row.area] if entry.key == row.entry))
    raise SettingChanged("The finding of the audit no longer applies. Nothing was changed. Audit again.")


async def _restore(
    database: Database, setting: LiveSetting, result: ItemResult, by: str, requested_at: datetime, *, dry_run: bool
) -> None:
    async with database.transaction() as session:
        change = await last_change(session, setting.row.id, "applied", "begun", "restored")
    if change is None or (change.restored_at and change.restored_at < requested_at):
        raise NothingToRestore
    result.new_value = change.previous
    if change.restored_at:  # after the request: by an earlier attempt of this job, or by another job
        if not settings_equal(setting.value, change.previous):
            raise NothingToRestore
        result.message = "The previous value is already set"
        return
    if not settings_equal(setting.value, change.previous):
        if not settings_equal(setting.value, change.new):
            raise SettingChanged(
                f"The value is {result.previous_value!r}, and was set to {change.new!r}: it was changed since. "
                "Nothing was overwritten."
            )
        if dry_run:
            result.message = "The previous value would be restored"
            return
        result.changed = True
        after = await setting.write(change.previous)
        if not settings_equal(after.value, change.previous):
            raise ValueNotAccepted(
                f"The service did not accept the previous value; the value is {to_storable(after.value)[0]!r} now."
            )
    if not dry_run:
        await _finish_change(database, change.id, "restored", by)
    result.message = "Configuration restored successfully" if result.changed else "The previous value is already set"


async def _revert(setting: LiveSetting, previous: Any) -> tuple[bool, str]:
    """Restore the previous value after a write with another effect. Returns whether that worked, and a message."""
    written, _ = to_storable(setting.value)
    if settings_equal(setting.value, previous):
        return True, f"The value is still {written!r} after the write: the service does not accept the recommended one."
    try:
        reverted = await setting.write(previous)
    except ServiceError as error:
        return (
            False,
            f"The value became {written!r}, and the previous one could not be restored: {error.message}",
        )
    if not settings_equal(reverted.value, previous):
        return (
            False,
            f"The value became {to_storable(reverted.value)[0]!r}; the service did not accept the previous one either.",
        )
    return True, f"The value became {written!r}: the service did not accept the recommended one. It was reverted."


async def _record_already_set(database: Database, row: Recommendation, by: str, *, dry_run: bool) -> bool:
    """Record that the recommended value is already set. Returns whether Forgearr has set it."""
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
    """Record the value that the service made of the write, so that a rollback recognizes it."""
    async with database.transaction() as session:
        if change := await session.get(SettingChange, change_id, with_for_update=True):
            change.new = actual


async def _finish_change(database: Database, change_id: int, outcome: ChangeOutcome, by: str = "") -> None:
    """Store the outcome of a change, and update its recommendation."""
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
