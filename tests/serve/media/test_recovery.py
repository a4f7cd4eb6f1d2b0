"""/api/v1/recovery: decisions, the policy and runs. The metrics of downloads."""

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select

from cluster.db import now
from cluster.services import store as service_store
from cluster.settings import get_settings
from jobs.tables import Job
from pipelines.media.downloads import cases, watch_downloads
from pipelines.media.downloads import log as recovery_log
from pipelines.media.downloads.log import Recovery, build_recovery
from pipelines.media.downloads.policy import Decision, History, RecoveryPolicy, Verdict
from pipelines.media.downloads.tables import FollowedDownload, FollowedService
from tests.support.api_client import ApiClient

pytestmark = pytest.mark.both_databases

POLICY = "/api/v1/recovery/policy"


def defaults(**values: Any) -> dict[str, Any]:
    return {**get_settings().recovery.model_dump(), **values}


@pytest.fixture
async def service_id(api: ApiClient) -> int:
    """A service with a failed download, and the recoveries recorded for it."""
    policy = RecoveryPolicy.model_validate(defaults())
    at = now()
    async with api.database.transaction() as session:
        service = await service_store.create(
            session, {"name": "TV", "type": "sonarr", "url": "http://127.0.0.1:9"}, "ada"
        )
        session.add(
            FollowedService(service_id=service.id, connected_as_of=at, cursor={}, failed=2, underway=1, bytes_left=1024)
        )
        download = {"service_id": service.id, "download_id": "one", "title": "Épisode", "tags": [], "content": []}
        session.add(
            FollowedDownload(
                **download, item="one", state="failed", moved_at=at, ended_at=at, settled=True, strikes=3, reason="Lost"
            )
        )
        columns: dict[str, Any] = {"service_id": service.id, "service": "TV", "item": "one", "title": "Épisode"}
        decisions: list[tuple[Verdict, bool]] = [("replace", False), ("replace", True), ("give_up", True)]
        for verdict, execute in decisions:
            decision = Decision(verdict, "Lost")
            await recovery_log.record_decision(
                session, build_recovery(decision, policy, execute=execute, at=at, job_id="job_1", **columns)
            )
    return service.id


async def test_decisions_are_shown_with_their_reasons(api: ApiClient, service_id: int) -> None:
    body = (await api.request("ada", "GET", "/api/v1/recovery")).json()
    assert body["total"] == 3
    last, begun, dry = body["items"]
    assert (last["decision"], last["outcome"], last["reason"], last["service"]) == ("give_up", "noted", "Lost", "TV")
    assert (begun["outcome"], dry["outcome"], dry["dry_run"]) == ("begun", "dry_run", True)
    assert dry["policy"]["max_per_hour"] == 10
    for query, total in (("decision=replace", 2), ("dry_run=false", 2), ("service=tv", 3), ("item=two", 0)):
        assert (await api.request("ada", "GET", f"/api/v1/recovery?{query}")).json()["total"] == total
    assert (await api.request("ada", "GET", "/api/v1/recovery?decision=anything")).status_code == 422
    (download,) = (await api.request("ada", "GET", "/api/v1/recovery/downloads?state=failed")).json()["items"]
    assert (download["item"], download["strikes"], download["title"]) == ("one", 3, "Épisode")


async def test_administrators_set_and_reset_the_policy(api: ApiClient, service_id: int) -> None:
    body = (await api.request("ada", "GET", POLICY)).json()
    assert body == {"policy": defaults(), "changed_by": None, "changed_at": None}
    policy = defaults(dry_run=False, strikes=9, protected_tags=["keep"])
    assert (await api.request("ada", "PUT", POLICY, json=policy)).status_code == 403
    changed = (await api.request("admin", "PUT", POLICY, json=policy)).json()
    assert (changed["policy"], changed["changed_by"]) == (policy, "admin")
    assert (await api.request("ada", "GET", POLICY)).json() == changed
    async with api.database.read_transaction() as session:
        (row,) = await cases.find_cases(session, RecoveryPolicy(**policy), [service_id], now())
        assert row.settled is False  # a new policy makes the case open again
    for wrong in ({"strikes": 0}, {"strikes": "9"}, {"leftovers": "burn"}, {"more": 1}):
        assert (await api.request("admin", "PUT", POLICY, json={**policy, **wrong})).status_code == 422
    assert (await api.request("admin", "PUT", POLICY, json={"strikes": 3})).status_code == 422
    assert (await api.request("ada", "GET", POLICY)).json() == changed
    assert (await api.request("admin", "DELETE", POLICY)).status_code == 204
    assert (await api.request("ada", "GET", POLICY)).json()["changed_by"] is None


async def test_administrators_queue_a_recovery_job(api: ApiClient) -> None:
    responses = [await api.request("admin", "POST", "/api/v1/recovery/run", json={"dry_run": True}) for _ in range(2)]
    assert [response.status_code for response in responses] == [202, 202]
    job_id = responses[0].json()["job_id"]
    assert responses[1].json()["job_id"] == job_id  # the queued job is reused
    async with api.database.read_transaction() as session:
        job = await session.get_one(Job, job_id)
    assert (job.kind, job.spec, job.tracked) == ("recover_downloads", {"dry_run": True}, True)
    assert (await api.request("ada", "POST", "/api/v1/recovery/run", json={})).status_code == 403
    assert (await api.request("admin", "POST", "/api/v1/recovery/run", json={"dry_run": 1})).status_code == 422


async def test_metrics_count_downloads_and_recoveries(api: ApiClient, service_id: int) -> None:
    metrics = (await api.request("ada", "GET", "/metrics")).text
    for line in (
        'downloads_failed_total{service="TV"} 2.0',
        'downloads_in_queue{service="TV"} 1.0',
        'downloads_bytes_left{service="TV"} 1024.0',
        'downloads_without_progress{service="TV"} 1.0',
        'recoveries{decision="replace",outcome="begun"} 1.0',
    ):
        assert line in metrics


async def test_old_rows_are_removed_except_unfinished_recoveries(api: ApiClient, service_id: int) -> None:
    long_ago = now() - timedelta(days=31)
    async with api.database.transaction() as session:
        for row in [*await session.scalars(select(Recovery))]:
            row.at = long_ago
        for row in [*await session.scalars(select(FollowedDownload))]:
            row.ended_at = long_ago
    assert await watch_downloads.remove_old_recoveries(api.database) == 2
    assert await watch_downloads.remove_old_downloads(api.database) == 1
    async with api.database.read_transaction() as session:
        assert len(await recovery_log.unfinished_recoveries(session, now())) == 1


async def test_the_history_contains_only_executed_recoveries(api: ApiClient, service_id: int) -> None:
    async with api.database.read_transaction() as session:
        past = await recovery_log.load_history(session, service_id, "one", "Other", now())
        other = await recovery_log.load_history(session, service_id, "two", "Two", now())
    assert (past.actions_last_hour, past.retries, past.last_at is not None) == (1, 0, True)
    assert other == History(0, None, 1)
