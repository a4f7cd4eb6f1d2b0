"""The kind `backup`, and its schedule."""

from pathlib import Path

import pytest
from sqlalchemy import select

from cluster.audit_log import AuditLogEntry
from cluster.db import Database
from cluster.errors import Forbidden, SettingsError
from cluster.ownership import LOCAL, Principal
from cluster.settings import get_settings, load_settings
from jobs import backup, queue, schedules
from jobs.backup import NoPassphrase, NotPossibleHere
from jobs.queue import JobRequest
from jobs.schedules import ScheduleRequest
from jobs.tables import Schedule
from tests.support.run_jobs import run_queued

PASSPHRASE = "correct horse battery"


def configure(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(f"FORGEARR_{name}", value)
    get_settings.cache_clear()


async def make_backup(database: Database) -> None:
    async with database.transaction() as session:
        await queue.enqueue(session, JobRequest(kind="backup"), LOCAL)
    await run_queued(database, "backup")


async def schedule_of(database: Database) -> Schedule | None:
    async with database.transaction() as session:
        await backup.follow_settings(session)
    async with database.read_transaction() as session:
        return await session.scalar(select(Schedule).where(Schedule.kind == "backup"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.both_databases
async def test_it_makes_backups_and_keeps_the_newest(
    database: Database, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, BACKUP__PASSPHRASE=PASSPHRASE, BACKUP__KEEP="1")
    await make_backup(database)
    (first,) = names(home / "backups")
    old = first.rpartition("-")[0] + "-20010101T000000Z.tar"
    (home / "backups" / first).rename(home / "backups" / old)
    (home / "backups" / "mine.txt").touch()
    await make_backup(database)
    second, mine = names(home / "backups")
    assert (second > old, mine) == (True, "mine.txt")
    async with database.read_transaction() as session:
        entries = list(await session.scalars(select(AuditLogEntry).order_by(AuditLogEntry.id)))
    assert [entry.action for entry in entries] == ["backup.create"] * 2
    assert entries[1].target == str(home / "backups" / second)
    assert (entries[1].details or {})["deleted"] == [str(home / "backups" / old)]


async def test_it_needs_a_passphrase_and_one_machine(
    database: Database, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NoPassphrase):
        await make_backup(database)
    configure(monkeypatch, BACKUP__PASSPHRASE=PASSPHRASE, RAY__ADDRESS="head.example:6379")
    with pytest.raises(NotPossibleHere):
        await make_backup(database)
    assert not (home / "backups").exists()


async def test_it_is_for_administrators(database: Database) -> None:
    async with database.transaction() as session:
        with pytest.raises(Forbidden):
            await queue.enqueue(session, JobRequest(kind="backup"), Principal(id="1", name="uli"))


async def test_the_schedule_follows_the_settings(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await schedule_of(database) is None
    configure(monkeypatch, BACKUP__PASSPHRASE=PASSPHRASE, BACKUP__SCHEDULE="0 3 * * *")
    first = await schedule_of(database)
    assert first is not None
    assert (first.name, first.cron, first.enabled) == ("backup", "0 3 * * *", True)
    async with database.transaction() as session:
        stored = await schedules.get(session, first.id, LOCAL)
        paused = ScheduleRequest(name="backup", kind="backup", cron="0 3 * * *", enabled=False)
        await schedules.replace(session, stored, paused, LOCAL)
    unchanged = await schedule_of(database)
    assert unchanged is not None
    assert not unchanged.enabled
    configure(monkeypatch, BACKUP__SCHEDULE="30 4 * * *")
    changed = await schedule_of(database)
    assert changed is not None
    assert (changed.id, changed.cron) == (first.id, "30 4 * * *")
    configure(monkeypatch, BACKUP__SCHEDULE="null")
    assert await schedule_of(database) is None


async def test_without_its_module_there_is_no_schedule(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, BACKUP__PASSPHRASE=PASSPHRASE, BACKUP__SCHEDULE="0 3 * * *", JOBS__MODULES="[jobs.sweep]")
    monkeypatch.setattr(backup, "kinds", dict)
    assert await schedule_of(database) is None


def test_a_schedule_needs_a_passphrase(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_BACKUP__SCHEDULE", "0 3 * * *")
    with pytest.raises(SettingsError, match=r"backup\.passphrase has to be set"):
        load_settings()
    monkeypatch.setenv("FORGEARR_BACKUP__PASSPHRASE", "too short")
    with pytest.raises(SettingsError, match=r"'backup\.passphrase' cannot be \(hidden\)"):
        load_settings()
