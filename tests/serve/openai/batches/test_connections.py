"""Batches and light jobs of one worker share a few connections to PostgreSQL, however many they are."""

import asyncio
import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from cluster.db import Database
from cluster.files import store as file_store
from cluster.ownership import LOCAL
from cluster.settings import get_settings
from jobs import outputs, queue
from jobs.context import Context
from jobs.leases import Claim
from jobs.queue import JobRequest
from pipelines.training.models.registry import OnProgress
from serve.engines.gguf.replica import GgufEngine
from serve.engines.protocol import EmbeddingResult, Source
from serve.openai.batches import runner
from serve.openai.batches import store as batch_store
from tests.support.recording_link import RecordingLink
from tests.support.waiting import eventually_async

pytestmark = pytest.mark.both_databases

BATCHES, LIGHT_JOBS = 110, 128
MAX_CONNECTIONS = 20


class SlowEngine(GgufEngine):
    """An engine that answers when it may."""

    def __init__(self) -> None:
        super().__init__(get_settings().engines, _find_no_file)
        self.may_answer: Future[None] = Future()
        self.waiting = 0

    async def embed(
        self, reference: str, texts: Sequence[str], source: Source = None, account: str = ""
    ) -> EmbeddingResult:
        self.waiting += 1
        await asyncio.shield(asyncio.wrap_future(self.may_answer))
        return EmbeddingResult([[1.0] for _ in texts], tokens=1)


async def _find_no_file(reference: str, source: Source, on_progress: OnProgress) -> Path:
    raise AssertionError("it loads no model")


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
async def test_many_jobs_of_a_worker_hold_few_connections(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_MLFLOW__ENABLED", "false")
    get_settings.cache_clear()
    batches = await _create_batches(database)
    engine = SlowEngine()
    with ThreadPoolExecutor(BATCHES + LIGHT_JOBS) as threads:
        answers = [
            threads.submit(runner.run, _context(job_id, "batch"), batch_id, engine) for batch_id, job_id in batches
        ]
        try:
            await eventually_async(lambda: engine.waiting == BATCHES or any(answer.done() for answer in answers))
            light = [threads.submit(outputs.own_job, batches[0][1]) for _ in range(LIGHT_JOBS)]
            counts = [await _count_connections(database)]
            while not all(job.done() for job in light):
                counts.append(await _count_connections(database))
        finally:
            engine.may_answer.set_result(None)
        results = [await asyncio.to_thread(answer.result) for answer in answers]
    assert {result["status"] for result in results} == {"completed"}
    assert {job.result().id for job in light} == {batches[0][1]}
    assert max(counts) <= MAX_CONNECTIONS


async def _create_batches(database: Database) -> list[tuple[str, str]]:
    """Returns the ids of the batches and of their jobs."""
    request = {"custom_id": "1", "method": "POST", "url": "/v1/embeddings"}
    content = json.dumps({**request, "body": {"model": "forgearr/tiny", "input": "Hello"}}).encode()
    file = await file_store.create_file(
        database, BytesIO(content), filename="batch.jsonl", purpose="batch", principal=LOCAL
    )
    options: dict[str, Any] = {"endpoint": "/v1/embeddings", "input_file_id": file.id, "labels": {}}
    created: list[tuple[str, str]] = []
    async with database.transaction() as session:
        await queue.enqueue(session, JobRequest(kind="probe"), LOCAL)
        for _ in range(BATCHES):
            batch, job = await batch_store.create(session, **options, output_seconds=None, principal=LOCAL)
            created.append((batch.id, job.id))
    return created


def _context(job_id: str, kind: str) -> Context:
    return Context(Claim(job_id, "t", kind, {}, None, 1, 1, None, None, {}, "worker-1", None), RecordingLink())


async def _count_connections(database: Database) -> int:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    async with database.read_transaction() as session:
        return await session.scalar(text(query)) or 0
