"""Trainings stay while a model version, a session or an unfinished job refers to them."""

from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import select

from cluster.db import Database, now
from cluster.ownership import LOCAL
from cluster.settings import get_settings
from jobs import retention
from jobs.states import State
from jobs.tables import Job
from pipelines.training.retention import delete_old_sessions
from pipelines.training.sessions import TrainingSession
from tests.support.platform import unused_ports
from tests.support.registry_model import RegistryModel


async def add_job(database: Database, kind: str, days: float = 400, **columns: Any) -> str:
    moment = now() - timedelta(days=days)
    state = columns.setdefault("state", State.SUCCEEDED)
    finished_at = None if state == State.QUEUED else moment
    defaults = {"spec": {}, "resources": {}, "demand": "1 CPU", "max_attempts": 1, "created_by": "ada"}
    job = Job(id=f"job_{uuid4().hex}", kind=kind, **{**defaults, **columns}, run_after=moment, created_at=moment)
    job.finished_at = finished_at
    async with database.transaction() as session:
        session.add(job)
    return job.id


async def add_session(database: Database, days: float, job_id: str | None) -> str:
    moment = now() - timedelta(days=days)
    columns = {"name": "House", "base_model": "forgearr/tiny", "config": {}, "created_by": "ada"}
    row = TrainingSession(**columns, job_id=job_id, created_at=moment, updated_at=moment)
    async with database.transaction() as session:
        session.add(row)
    return row.id


async def remaining(database: Database) -> set[str]:
    async with database.read_transaction() as session:
        return set(await session.scalars(select(Job.id)))


def without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_MLFLOW__ENABLED", "false")
    get_settings.cache_clear()


async def test_a_model_stays_for_its_own_time(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    without_mlflow(monkeypatch)
    model = await add_job(database, "fine_tune", days=300)
    for state, days in ((State.SUCCEEDED, 400), (State.FAILED, 31), (State.CANCELLED, 31)):
        await add_job(database, "fine_tune", days=days, state=state)
    assert await retention.delete_expired(database) == 3
    assert await remaining(database) == {model}


async def test_a_training_stays_while_a_session_refers_to_it(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_mlflow(monkeypatch)
    old, changed = [await add_job(database, "fine_tune") for _ in range(2)]
    queued = await add_job(database, "fine_tune", state=State.QUEUED)
    await add_session(database, 400, None)
    for days, job_id in ((400, old), (10, changed), (400, queued)):
        await add_session(database, days, job_id)
    assert await retention.delete_expired(database) == 0
    assert await delete_old_sessions(database) == 2
    assert await delete_old_sessions(database) == 0
    assert await retention.delete_expired(database) == 1
    assert await remaining(database) == {changed, queued}


async def test_a_training_stays_while_an_unfinished_job_reads_it(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_mlflow(monkeypatch)
    read, forge = await add_job(database, "fine_tune"), await add_job(database, "forge")
    export = await add_job(database, "export", parent_id=forge)
    readers = {
        await add_job(database, "export", state=State.QUEUED, spec={"job_id": read}),
        await add_job(database, "deploy", state=State.QUEUED, spec={"export_job_id": export}),
    }
    await add_job(database, "export", spec={"job_id": await add_job(database, "fine_tune")})
    assert await retention.delete_expired(database) == 2
    assert await remaining(database) == {read, forge, export, *readers}


async def test_what_made_a_version_stays_with_its_family(database: Database, registry_model: RegistryModel) -> None:
    parents = [await add_job(database, "forge") for _ in range(2)]
    trainings = [await add_job(database, "fine_tune", parent_id=parent) for parent in parents]
    exports: list[str] = []
    for parent, training in zip(parents, trainings, strict=True):
        export = await add_job(database, "export", parent_id=parent)
        run_id = await registry_model.run(export)
        async with database.transaction() as session:
            (await session.get_one(Job, export)).mlflow_run_id = run_id
        await registry_model.registry.register(
            registry_model.name,
            run_id,
            [registry_model.file(export.encode())],
            base_model="forgearr/tiny",
            job_id=training,
            export_job_id=export,
            principal=LOCAL,
        )
        exports.append(export)
    # The first version is left as a copy only, which has its files in the run of the export.
    first = await registry_model.registry.find(f"{registry_model.name}:v1")
    await registry_model.registry.copy(first, f"{registry_model.name}-copy")
    await registry_model.registry.delete_versions(registry_model.name, [1])
    forgotten = await add_job(database, "fine_tune")
    kept = {*parents, *trainings, *exports}
    assert await retention.delete_expired(database) == 1, forgotten
    assert await remaining(database) == kept

    await registry_model.registry.delete_model(f"{registry_model.name}-copy")
    assert await retention.delete_expired(database) == 3
    assert await remaining(database) == {parents[1], trainings[1], exports[1]}


async def test_no_training_is_deleted_while_the_registry_is_away(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGEARR_MLFLOW__TRACKING_URI", f"http://127.0.0.1:{unused_ports(1)[0]}")
    get_settings.cache_clear()
    kept = {await add_job(database, "fine_tune"), await add_job(database, "export")}
    await add_job(database, "validate")
    assert await retention.delete_expired(database) == 1
    assert await remaining(database) == kept
