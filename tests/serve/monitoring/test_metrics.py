"""The metrics that Prometheus scrapes."""

import json
import logging
import re
from collections.abc import AsyncIterator, Iterable, Iterator
from datetime import timedelta
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import event, text

from cluster import events
from cluster.db import Database, now
from cluster.ownership import LOCAL
from cluster.services import store as service_store
from jobs import queue
from jobs.queue import JobRequest
from jobs.states import State
from pipelines.media.downloads.tables import FollowedService
from serve.middleware.request_frame import RequestContextMiddleware
from serve.monitoring import metrics
from serve.monitoring.metrics import RequestMetrics


def samples(text: str) -> dict[tuple[str, str, str], float]:
    """The samples of a scrape, without the buckets, by name, path and status."""
    return {
        (sample.name, sample.labels.get("path", ""), sample.labels.get("status", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "le" not in sample.labels
    }


@pytest.fixture
def own(database: Database) -> RequestMetrics:
    return RequestMetrics()


@pytest.fixture
async def client(own: RequestMetrics) -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()
    router = APIRouter(prefix="/items")

    @router.get("/{item_id}")
    async def show(item_id: int) -> int:
        return item_id

    app.include_router(router, prefix="/api")
    app.add_middleware(RequestContextMiddleware, metrics=own)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        yield client


async def test_requests_are_counted_by_the_template_of_their_route(
    client: httpx.AsyncClient, own: RequestMetrics
) -> None:
    for path in ("/api/items/1", "/api/items/2", "/api/items/x", "/made/up", "/made/up/too"):
        await client.get(path)
    values = samples((await own.render()).decode())
    assert values["api_requests_total", "/api/items/{item_id}", "200"] == 2
    assert values["api_requests_total", "/api/items/{item_id}", "422"] == 1
    assert values["api_requests_total", "(none)", "404"] == 2
    assert values["api_request_duration_seconds_count", "/api/items/{item_id}", "200"] == 2
    assert values["api_request_duration_seconds_sum", "/api/items/{item_id}", "200"] > 0


async def test_unknown_methods_share_one_series(client: httpx.AsyncClient, own: RequestMetrics) -> None:
    for number in range(5):
        await client.request(f"METHOD{number}", "/api/items/1")
    text = (await own.render()).decode()
    assert 'api_requests_total{method="other",path="/api/items/{item_id}",status="405"} 5.0' in text


async def test_a_scrape_of_any_replica_counts_all_of_them(own: RequestMetrics, shared: events.Events) -> None:
    dead, other = RequestMetrics(), RequestMetrics()
    for replica, count in ((own, 1), (dead, 2), (other, 3)):
        for _ in range(count):
            replica.observe("GET", "/a", 200, 0.003)
    other.observe("GET", "/b", 500, 3.0)
    for replica in (dead, other):
        await replica.share()

    text = (await own.render()).decode()
    values = samples(text)
    assert values["api_requests_total", "/a", "200"] == 6
    assert values["api_requests_total", "/b", "500"] == 1
    assert 'api_request_duration_seconds_bucket{le="0.0025",method="GET",path="/a",status="200"} 0.0' in text
    assert 'api_request_duration_seconds_bucket{le="0.005",method="GET",path="/a",status="200"} 6.0' in text


async def test_a_replica_does_not_count_shared_requests_twice(own: RequestMetrics, shared: events.Events) -> None:
    own.observe("GET", "/a", 200, 0.001)
    await own.share()
    own.observe("GET", "/a", 200, 0.001)
    assert samples((await own.render()).decode())["api_requests_total", "/a", "200"] == 2


async def test_counts_that_could_not_be_shared_are_shared_later(
    own: RequestMetrics, request: pytest.FixtureRequest
) -> None:
    own.observe("GET", "/a", 200, 0.001)
    await own.share()  # without Ray there is no actor to share them with
    shared: events.Events = request.getfixturevalue("shared")
    await own.share()
    assert (await shared.shared_counts())[own.replica] == own.snapshot()


async def test_collectors_of_other_modules_add_metrics(own: RequestMetrics, monkeypatch: pytest.MonkeyPatch) -> None:
    async def queue_depth() -> Iterable[Metric]:
        return [GaugeMetricFamily("jobs_queued", "Jobs that wait.", value=7)]

    monkeypatch.setattr(metrics, "collectors", [queue_depth])
    assert samples((await own.render()).decode())["jobs_queued", "", ""] == 7


async def test_a_failed_collector_does_not_hide_other_metrics(
    own: RequestMetrics, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken() -> Iterable[Metric]:
        raise OSError("the database is away")

    monkeypatch.setattr(metrics, "collectors", [broken])
    own.observe("GET", "/a", 200, 0.001)
    with caplog.at_level(logging.ERROR):
        text = (await own.render()).decode()
    assert samples(text)["api_requests_total", "/a", "200"] == 1
    assert "the database is away" in caplog.text


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> events.Events:
    """The events actor, in this process."""
    actor = events.Events()
    monkeypatch.setattr(events, "share_counts", actor.share_counts)
    monkeypatch.setattr(events, "shared_counts", actor.shared_counts)
    return actor


async def test_the_queue_is_counted_by_kind_and_state(
    client: httpx.AsyncClient, own: RequestMetrics, database: Database
) -> None:
    async with database.transaction() as session:
        first, *_ = [await queue.enqueue(session, JobRequest(kind="probe"), LOCAL) for _ in range(3)]
        await queue.pause(session, first)
        await queue.enqueue(session, JobRequest(kind="probe", depends_on=[first.id]), LOCAL)
    text = (await own.render()).decode()
    assert 'jobs{kind="probe",state="queued"} 3.0' in text
    assert 'jobs{kind="probe",state="paused"} 1.0' in text
    assert "job_queue_depth 2.0" in text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["job_queue_oldest_seconds"].samples[0].value > 0


async def test_finished_jobs_are_counted_for_an_hour(own: RequestMetrics, database: Database) -> None:
    async with database.transaction() as session:
        for minutes, state in ((1, State.FAILED), (59, State.SUCCEEDED), (61, State.SUCCEEDED)):
            job = await queue.enqueue(session, JobRequest(kind="probe"), LOCAL)
            job.state, job.finished_at = state, now() - timedelta(minutes=minutes)
    text = (await own.render()).decode()
    assert 'jobs{kind="probe",state="succeeded"} 1.0' in text
    assert 'jobs{kind="probe",state="failed"} 1.0' in text


async def test_scrapes_that_follow_each_other_read_the_database_once(own: RequestMetrics, database: Database) -> None:
    statements = _record_statements(database)
    await own.render()
    assert statements
    read = len(statements)
    await own.render()
    assert len(statements) == read


@pytest.mark.both_databases
async def test_a_scrape_reads_only_parts_of_indexes(own: RequestMetrics, database: Database) -> None:
    async with database.transaction() as session:
        service = await service_store.create(
            session, {"name": "TV", "type": "sonarr", "url": "http://127.0.0.1:9"}, "ada"
        )
        session.add(FollowedService(service_id=service.id, connected_as_of=now(), cursor={}))
    statements = _record_statements(database)
    await own.render()
    queries = [(statement, values) for statement, values in statements if statement.startswith("SELECT")]
    large = [query for query in queries if re.search(r"FROM (jobs|recoveries|followed_downloads)", query[0])]
    assert len(large) >= 4
    async with database.engine.connect() as connection:
        if database.is_sqlite:
            for statement, values in large:
                plan = await connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values)
                steps = [row.detail for row in plan]
                assert not [step for step in steps if step.startswith("SCAN")], (statement, steps)
            return
        await connection.execute(text("SET enable_seqscan = off"))  # these tables are empty
        for statement, values in large:
            plan = (await connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {statement}", values)).scalar_one()
            nodes = list(_nodes((json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"]))
            scans = [node for node in nodes if node["Node Type"].endswith("Scan") and "Recheck Cond" not in node]
            assert scans
            assert not [node for node in scans if "Index Cond" not in node], (statement, nodes)


def _record_statements(database: Database) -> list[tuple[str, Any]]:
    """The statements that are executed from now on, with their values."""
    statements: list[tuple[str, Any]] = []

    def record(connection: Any, cursor: Any, statement: str, values: Any, context: Any, executemany: bool) -> None:
        statements.append((statement, values))

    event.listen(database.engine.sync_engine, "before_cursor_execute", record)
    return statements


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from _nodes(child)
