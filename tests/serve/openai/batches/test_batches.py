"""Lines of batches, on an engine in this process that is unavailable at times, and the cleanup of batches."""

import asyncio
import json
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster import storage
from cluster.db import Database, now
from cluster.errors import Unavailable
from cluster.files import store as file_store
from cluster.files.tables import File
from cluster.ownership import LOCAL, Principal
from cluster.settings import get_settings
from jobs import queue, retention
from jobs.states import State
from jobs.tables import Job
from pipelines.training.models.registry import OnProgress
from serve.engines.gguf.replica import GgufEngine
from serve.engines.protocol import EngineBusy, EngineLost, EngineRequest, EngineUnavailable, Source
from serve.openai.batches import store as batch_store
from serve.openai.batches.line import MAX_ENGINE_LOSSES, LineRunner
from serve.openai.batches.store import Batch
from serve.openai.files.validation import BatchLine
from tests.support.small_models import write_constant_model
from tests.support.waiting import eventually_async

pytestmark = pytest.mark.both_databases

TINY = "forgearr/tiny"
TEXT = "Sonarr watches."


class UnreliableEngine(GgufEngine):
    """An engine whose first calls raise these errors."""

    errors: Sequence[Unavailable] = ()
    calls = 0

    async def complete(
        self, reference: str, request: EngineRequest, source: Source = None, account: str = ""
    ) -> dict[str, Any]:
        self.calls += 1
        if self.calls <= len(self.errors):
            raise self.errors[self.calls - 1]
        return await super().complete(reference, request, source, account)


@pytest.fixture
def engine(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UnreliableEngine:
    monkeypatch.setenv("FORGEARR_MLFLOW__ENABLED", "false")
    monkeypatch.setenv("FORGEARR_JOBS__RETRY_SECONDS", "0")
    get_settings.cache_clear()
    file = write_constant_model(tmp_path / "model.gguf", TEXT)

    async def find_file(reference: str, source: Source, on_progress: OnProgress) -> Path:
        return file

    return UnreliableEngine(get_settings().engines, find_file)


@pytest.fixture
def runner(engine: UnreliableEngine, database: Database) -> LineRunner:
    return LineRunner(database, engine, LOCAL)


def line(**options: Any) -> BatchLine:
    body = {"model": TINY, "messages": [{"role": "user", "content": "Hello"}], **options}
    return BatchLine(custom_id="one", method="POST", url="/v1/chat/completions", body=body)


async def test_a_batch_lets_other_accounts_answer(engine: UnreliableEngine, database: Database) -> None:
    """While its lines wait for the four slots of the model, the next free slot goes to somebody else."""
    batch, finished = LineRunner(database, engine, Principal(id="a" * 36, name="ada")), list[str]()

    async def run_line(number: int) -> None:
        assert (await batch.run(number, line())).succeeded
        finished.append("ada")

    async def chat() -> None:
        await engine.complete(TINY, line().body, None, "b" * 36)
        finished.append("bob")

    await run_line(0)
    (pooled,) = engine._pool.loaded()  # pyright: ignore[reportPrivateUsage]
    slots = pooled.loading.result()._slots  # pyright: ignore[reportPrivateUsage]
    async with AsyncExitStack() as held:
        for _ in range(4):
            await held.enter_async_context(slots.take("a" * 36))
        tasks = [asyncio.create_task(run_line(number)) for number in range(1, 13)]
        await eventually_async(lambda: engine.loaded_models[0].users == 12)
        tasks.append(asyncio.create_task(chat()))
        await eventually_async(lambda: engine.loaded_models[0].users == 13)
    await asyncio.gather(*tasks)
    assert finished.index("bob") <= 5  # one line came first, and four slots end at about the same time


async def test_calls_of_an_unavailable_engine_are_repeated(runner: LineRunner, engine: UnreliableEngine) -> None:
    engine.errors = [EngineBusy()] * 9 + [EngineUnavailable()] * 3 + [EngineLost()] * MAX_ENGINE_LOSSES
    outcome = await runner.run(7, line())
    assert (outcome.number, outcome.succeeded) == (7, True)
    assert engine.calls == len(engine.errors) + 1
    result = json.loads(outcome.line)
    assert result["response"]["body"]["choices"][0]["message"]["content"] == TEXT
    assert outcome.usage == result["response"]["body"]["usage"]


async def test_a_line_fails_after_too_many_lost_engines(runner: LineRunner, engine: UnreliableEngine) -> None:
    engine.errors = [EngineLost()] * (MAX_ENGINE_LOSSES + 1)
    outcome = await runner.run(1, line())
    result = json.loads(outcome.line)
    assert (outcome.succeeded, result["response"]["status_code"]) == (False, 503)
    assert result["response"]["body"]["error"]["code"] == "engine_lost"


async def test_a_job_uses_its_own_database(engine: UnreliableEngine, database: Database) -> None:
    """The database of its process belongs to another event loop."""

    async def run_line() -> bytes:
        own = Database(get_settings().database_url)
        try:
            return (await LineRunner(own, engine, LOCAL).run(1, line(model="job_20260101_000000_abcd"))).line
        finally:
            await own.close()

    async with database.read_transaction() as session:
        await session.get(Job, "job_none")
    result = json.loads(await asyncio.to_thread(lambda: asyncio.run(run_line())))
    assert result["response"]["status_code"] == 404


async def test_the_parts_of_a_failed_batch_are_removed_after_the_retry_period(database: Database) -> None:
    file = await file_store.create_file(database, BytesIO(b"{}"), filename="b.jsonl", purpose="batch", principal=LOCAL)
    addresses: dict[State, str] = {}
    long_ago = now() - timedelta(days=get_settings().jobs.event_days + 1)
    for state in (State.FAILED, State.SUCCEEDED, State.RUNNING):
        async with database.transaction() as session:
            batch, job = await create_batch(session, file)
            job.state, job.finished_at = state, long_ago
        addresses[state] = storage.address(batch_store.parts_folder(batch.id))
        storage.write(BytesIO(b"{}"), f"{batch_store.parts_folder(batch.id)}/part")
    assert await batch_store.remove_left_over(database) == 1
    assert {state for state, address in addresses.items() if storage.exists(address)} == {
        State.SUCCEEDED,
        State.RUNNING,
    }
    assert await batch_store.remove_left_over(database) == 0


async def test_an_old_batch_goes_with_its_output_files_and_then_its_job(database: Database) -> None:
    file = await file_store.create_file(database, BytesIO(b"{}"), filename="b.jsonl", purpose="batch", principal=LOCAL)
    outputs = [
        await file_store.create_file(database, BytesIO(b"{}"), filename="o", purpose="batch_output", principal=LOCAL)
        for _ in range(2)
    ]
    batches: dict[int, str] = {}
    for days, output in ((31, outputs[0]), (29, outputs[1])):
        async with database.transaction() as session:
            batch, job = await create_batch(session, file)
            job.state, job.result = State.SUCCEEDED, {"output_file_id": output.id, "error_file_id": None}
            job.created_at = job.finished_at = now() - timedelta(days=days)
        batches[days] = batch.id
    assert await retention.delete_expired(database) == 0  # the batch keeps its job
    assert await batch_store.remove_old(database) == 1
    assert await file_store.remove_expired(database) == 1
    assert [storage.exists(output.address) for output in outputs] == [False, True]
    assert storage.exists(file.address)
    async with database.read_transaction() as session:
        assert list(await session.scalars(select(batch_store.Batch.id))) == [batches[29]]
    assert await retention.delete_expired(database) == 1


async def test_a_failed_batch_contains_the_error_of_its_job(database: Database) -> None:
    file = await file_store.create_file(database, BytesIO(b"{}"), filename="b.jsonl", purpose="batch", principal=LOCAL)
    async with database.transaction() as session:
        batch, job = await create_batch(session, file)
        assert batch_store.to_openai(batch, job)["status"] == "validating"
        await queue.finish_waiting_jobs(
            session, [job], State.FAILED, {"code": "file_not_found", "message": "It is gone."}
        )
    async with database.read_transaction() as session:
        body = batch_store.to_openai(batch, await session.get_one(Job, job.id))
    assert (body["status"], body["errors"][0]["message"]) == ("failed", "It is gone.")


async def create_batch(session: AsyncSession, file: File) -> tuple[Batch, Job]:
    return await batch_store.create(
        session, endpoint="/v1/embeddings", input_file_id=file.id, labels={}, output_seconds=None, principal=LOCAL
    )
