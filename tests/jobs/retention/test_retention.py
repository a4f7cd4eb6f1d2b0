"""Finished jobs are deleted after a time, with all that belongs to them, unless something refers to them."""

import logging
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import func, insert, select

from cluster import mlflow_client, storage
from cluster.db import Database, now
from cluster.mlflow_client import MlflowRefused
from cluster.settings import get_settings
from jobs import retention
from jobs.retention import expired
from jobs.states import State
from jobs.tables import (
    DeletedJob,
    IdempotencyKey,
    Job,
    JobDependency,
    JobEvent,
    Leadership,
    Schedule,
    ScheduleTick,
)
from tests.support.platform import unused_ports
from tests.support.registry_model import RegistryModel

pytestmark = pytest.mark.both_databases


@pytest.fixture(autouse=True)
def _without_mlflow(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    configure(monkeypatch, MLFLOW__ENABLED="false")


def configure(monkeypatch: pytest.MonkeyPatch, **settings: str) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(f"FORGEARR_{name}", value)
    get_settings.cache_clear()


async def add_job(database: Database, days: float = 100, events: int = 1, **columns: Any) -> str:
    """Add a job that was created, and has finished, this long ago, with events."""
    moment = now() - timedelta(days=days)
    state = columns.setdefault("state", State.SUCCEEDED)
    finished = {"finished_at": moment} if state in {State.SUCCEEDED, State.FAILED, State.CANCELLED} else {}
    defaults = {"kind": "probe", "spec": {}, "resources": {}, "demand": "", "max_attempts": 1, "created_by": "ada"}
    job = Job(id=f"job_{uuid4().hex}", **{**defaults, **finished, **columns}, run_after=moment, created_at=moment)
    async with database.transaction() as session:
        session.add(job)
        await session.flush()
        if events:
            row = {"job_id": job.id, "type": str(state), "data": {}, "created_at": moment}
            await session.execute(insert(JobEvent), [row] * events)
    return job.id


async def add(database: Database, *rows: Any) -> None:
    async with database.transaction() as session:
        session.add_all(rows)


async def remaining(database: Database) -> set[str]:
    async with database.read_transaction() as session:
        return set(await session.scalars(select(Job.id)))


async def count(database: Database, table: type[Any]) -> int:
    async with database.read_transaction() as session:
        return await session.scalar(select(func.count()).select_from(table)) or 0


async def test_an_old_job_goes_with_all_that_belongs_to_it(database: Database, tmp_path: Path) -> None:
    earlier = await add_job(database)
    old = await add_job(database, state=State.FAILED)
    child = await add_job(database, parent_id=old)
    grandchild = await add_job(database, parent_id=child, days=1)
    schedule = Schedule(id="s", name="s", kind="probe", spec={}, cron="* * * * *", timezone="UTC", created_by="ada")
    await add(database, schedule)
    long_ago = now() - timedelta(days=100)
    await add(
        database,
        JobDependency(job_id=old, depends_on_id=earlier),
        ScheduleTick(schedule_id="s", fire_at=long_ago, job_id=child),
        IdempotencyKey(owner="ada", key="k", request_hash="h", job_id=old, expires_at=long_ago),
    )
    fresh, running = await add_job(database, days=29), await add_job(database, state=State.RUNNING)
    (tmp_path / "weights").write_text("weights")
    folders = [storage.save(tmp_path / "weights", f"jobs/{job_id}/weights") for job_id in (grandchild, fresh)]

    assert await retention.delete_expired(database) == 4
    assert await retention.delete_remains(database) == 4
    assert await remaining(database) == {fresh, running}
    assert [storage.exists(folder) for folder in folders] == [False, True]
    assert not storage.exists(storage.address(f"jobs/{grandchild}"))
    for table, rows in ((JobEvent, 2), (JobDependency, 0), (ScheduleTick, 0), (IdempotencyKey, 0), (DeletedJob, 0)):
        assert await count(database, table) == rows


async def test_null_keeps_all_jobs(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = {await add_job(database), await add_job(database, kind="sweep")}
    configure(monkeypatch, RETENTION__JOB_DAYS="null", RETENTION__ROUTINE_HOURS="null")
    assert await retention.delete_expired(database) == 0
    assert await remaining(database) == jobs


async def test_routine_jobs_that_succeeded_go_after_a_day(database: Database) -> None:
    await add_job(database, days=1.1, kind="sweep")
    kept = {
        await add_job(database, days=0.9, kind="sweep"),
        await add_job(database, days=1.1, kind="sweep", state=State.FAILED),
        await add_job(database, days=1.1),
    }
    assert await retention.delete_expired(database) == 1
    assert await remaining(database) == kept
    assert await count(database, DeletedJob) == 0  # they leave no files


async def test_a_job_that_is_needed_stays_with_its_family(database: Database) -> None:
    parent_of_running, needed_later, scheduled, keyed = [await add_job(database) for _ in range(4)]
    family = [await add_job(database, parent_id=parent_of_running, state=state) for state in ("running", "succeeded")]
    dependent = await add_job(database, state=State.PAUSED)
    base = await add_job(database)  # needed by one that is needed
    unknown = await add_job(database, kind="of a module that is not in jobs.modules")
    schedule = {"kind": "probe", "spec": {}, "cron": "0 0 1 1 *", "timezone": "UTC", "created_by": "ada"}
    await add(
        database,
        JobDependency(job_id=dependent, depends_on_id=needed_later),
        JobDependency(job_id=needed_later, depends_on_id=base),
        Schedule(id="s", name="s", **schedule, last_job_id=scheduled),
        IdempotencyKey(owner="ada", key="k", request_hash="h", job_id=keyed, expires_at=now() + timedelta(hours=1)),
    )
    kept = {parent_of_running, needed_later, scheduled, keyed, *family, dependent, base, unknown}
    gone = await add_job(database)
    assert await retention.delete_expired(database) == 1
    assert await remaining(database) == kept, gone


async def test_a_job_stays_until_mlflow_was_told(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, MLFLOW__ENABLED="true", MLFLOW__TRACKING_URI=f"http://127.0.0.1:{unused_ports(1)[0]}")
    told, untracked, untold = [await add_job(database, tracked=tracked) for tracked in (True, False, True)]
    async with database.read_transaction() as session:
        last = await session.scalar(select(func.max(JobEvent.id)).where(JobEvent.job_id == told))
    leadership = {"holder": "here", "token": "t", "heartbeats": 0, "waiting": {}}
    await add(database, Leadership(id=1, **leadership, tracked_until=last))
    assert await retention.delete_expired(database) == 2
    assert await remaining(database) == {untold}, untracked


async def test_many_jobs_and_events_go_in_small_transactions(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expired, "PAGE", 3)
    monkeypatch.setattr(expired, "EVENT_PAGE", 4)
    parent = await add_job(database, days=200)
    kept = {parent, await add_job(database, parent_id=parent, state=State.RUNNING)}
    for number in range(10):
        await add_job(database, days=100 + number, events=number)
    assert await retention.delete_expired(database) == 10
    assert await remaining(database) == kept
    assert await count(database, JobEvent) == 2


async def test_the_run_of_a_deleted_job_is_deleted_in_mlflow_once_that_answers(
    database: Database,
    registry_model: RegistryModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    configure(monkeypatch, MLFLOW__ENABLED="true")
    mlflow = registry_model.mlflow
    run_id = await registry_model.run(uuid4().hex)
    await mlflow.upload(run_id, "report.md", b"all is well")
    address = f"{await mlflow.artifact_uri(run_id)}/report.md"
    await add_job(database, events=0, tracked=True, mlflow_run_id=run_id)
    await add_job(database, events=0)
    assert await retention.delete_expired(database) == 2

    answering = str(get_settings().mlflow_uri)
    configure(monkeypatch, MLFLOW__TRACKING_URI=f"http://127.0.0.1:{unused_ports(1)[0]}")
    with caplog.at_level(logging.WARNING):
        assert await retention.delete_remains(database) == 1
    assert "remain in MLflow until the next sweep" in caplog.text

    configure(monkeypatch, MLFLOW__TRACKING_URI=answering)
    assert await retention.delete_remains(database) == 1
    assert await count(database, DeletedJob) == 0
    run = await mlflow.call("GET", "runs/get", params={"run_id": run_id})
    assert run["run"]["info"]["lifecycle_stage"] == "deleted"
    with pytest.raises(MlflowRefused):
        await mlflow.download(address, registry_model.folder / "report.md")


async def test_runs_stay_in_mlflow_where_the_settings_say_so(
    database: Database, registry_model: RegistryModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, MLFLOW__ENABLED="true", RETENTION__MLFLOW_RUNS="false")
    run_id = await registry_model.run(uuid4().hex)
    await add_job(database, events=0, tracked=True, mlflow_run_id=run_id)
    assert await retention.delete_expired(database) == 1
    assert await retention.delete_remains(database) == 1
    async with mlflow_client.connect(str(get_settings().mlflow_uri)) as mlflow:
        run = await mlflow.call("GET", "runs/get", params={"run_id": run_id})
    assert run["run"]["info"]["lifecycle_stage"] == "active"
