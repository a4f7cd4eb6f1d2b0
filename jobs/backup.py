"""The kind `backup`: make a backup, and delete old ones. The schedule `backup` follows the settings."""

import asyncio
import logging
from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster import audit_log, backup
from cluster.db import Database, run_with_database
from cluster.errors import SettingsError
from cluster.ownership import LOCAL, system
from cluster.settings import get_settings
from jobs import schedules
from jobs.context import Context
from jobs.registry import job, kinds
from jobs.schedules import ScheduleRequest
from jobs.tables import Schedule

KIND = NAME = "backup"

log = logging.getLogger(__name__)


class BackupSpec(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NotPossibleHere(SettingsError):
    """On a joined Ray cluster a job may run on any node, and the files of a backup are on one: make backups there, with
    `forgearr backup`."""

    code = "BACKUP_NOT_POSSIBLE_HERE"


class NoPassphrase(SettingsError):
    """Backups are encrypted, so backup.passphrase has to be set."""

    code = "NO_PASSPHRASE"


@job(KIND, spec=BackupSpec, admin_only=True, concurrency=1)
def back_up(context: Context, spec: BackupSpec) -> dict[str, Any]:
    """Makes a backup of the installation in `backup.folder`, and deletes all but the newest `backup.keep`."""
    settings = get_settings()
    if settings.ray.address is not None:
        raise NotPossibleHere
    if settings.backup.passphrase is None:
        raise NoPassphrase
    folder = settings.backup_folder
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = asyncio.run(
        backup.create(
            folder,
            settings.backup.passphrase.get_secret_value(),
            lambda step, detail: context.log(f"{step}: {detail}"),
            lambda percent: context.report(progress=percent, phase="writing"),
        )
    )
    old = backup.remove_old(folder, settings.backup.keep)
    result = {"path": str(made.path), "bytes": made.bytes, "files": made.file_count, "deleted": [*map(str, old)]}
    run_with_database(lambda database: _record(database, context.job_id, result))
    return result


async def _record(database: Database, job_id: str, result: dict[str, Any]) -> None:
    async with database.transaction() as session:
        audit_log.record(session, "backup.create", system(f"job:{job_id}"), result["path"], **result)


async def follow_settings(session: AsyncSession) -> None:
    """Have the schedule `backup` be what the settings say. Without `backup.schedule` there is none."""
    cron = get_settings().backup.schedule
    schedule = await session.scalar(select(Schedule).where(Schedule.name == NAME, Schedule.kind == KIND))
    if cron is None:
        if schedule is not None:
            await session.delete(schedule)
        return
    if KIND not in kinds():
        return log.warning("no backups are made, because jobs.modules lacks %s", __name__)
    request = ScheduleRequest(name=NAME, kind=KIND, cron=cron)
    if schedule is None:
        await schedules.ensure(session, request)
    elif schedule.cron != cron:
        await schedules.replace(session, schedule, request, LOCAL)
