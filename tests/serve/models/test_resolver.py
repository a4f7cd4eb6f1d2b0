"""The resolver of model names: outputs of trainings and their owners, and names in the settings."""

from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from sqlalchemy import update

from cluster.db import Database
from cluster.ownership import LOCAL, Principal
from cluster.settings import get_settings
from jobs import queue
from jobs.outputs import OutputMissing
from jobs.queue import JobRequest
from jobs.states import State
from jobs.tables import Job
from pipelines.training.models.versions import ModelNotFound
from serve.app import create_app
from serve.engines.protocol import ModelFolder
from serve.models.resolver import ModelResolver

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)

ALICE, BOB = (Principal(id=name, name=name) for name in ("alice", "bob"))
NOW = datetime(2026, 5, 4, tzinfo=UTC)
RESULT = {"model": "/storage/jobs/1/model", "base_model": "forgearr/tiny"}


async def training(database: Database, state: State, principal: Principal = ALICE) -> str:
    async with database.transaction() as session:
        spec = {"data": {"dataset": "demo/homelab"}}
        job = await queue.enqueue(session, JobRequest(kind="fine_tune", spec=spec), principal)
        result = RESULT if state == State.SUCCEEDED else None
        finished = update(Job).where(Job.id == job.id).values(state=state, result=result, finished_at=NOW)
        await session.execute(finished)
        return job.id


async def test_the_output_of_a_training_belongs_to_its_owner(database: Database) -> None:
    job_id = await training(database, State.SUCCEEDED)
    for owner in (ALICE, LOCAL):
        resolved = await ModelResolver().resolve(job_id, owner)
        assert (resolved.reference, resolved.source) == (job_id, ModelFolder(RESULT["model"], "forgearr/tiny", NOW))
    with pytest.raises(ModelNotFound):
        await ModelResolver().resolve(job_id, BOB)


async def test_an_unfinished_training_has_no_output(database: Database) -> None:
    with pytest.raises(OutputMissing, match="is running"):
        await ModelResolver().resolve(await training(database, State.RUNNING), ALICE)


async def test_names_in_the_settings_are_resolved(
    database: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path
) -> None:
    monkeypatch.setenv("FORGEARR_MLFLOW__ENABLED", "false")
    monkeypatch.setenv("FORGEARR_ENGINES__FOLDERS", f"{{small: {tmp_path}}}")
    get_settings.cache_clear()
    resolved = await ModelResolver().resolve("small:latest", BOB)
    assert resolved.reference == "small"
    assert isinstance(resolved.source, ModelFolder)
    assert (resolved.source.address, resolved.source.base_model) == (None, str(tmp_path))
    transport = httpx.ASGITransport(create_app())
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["small", "forgearr/tiny"]
        assert (await client.get("/v1/models/small")).json()["id"] == "small"
        assert (await client.get("/v1/models/large")).status_code == 404
