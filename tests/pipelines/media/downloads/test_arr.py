"""Tracking of downloads in fakes of Sonarr and Radarr, and recovery of stuck and failed ones."""

import asyncio
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from cluster.db import Database, now, run_with_database
from cluster.services import store as service_store
from cluster.services.capabilities.download_tracking import TrackingPosition
from cluster.services.errors import BadResponse
from cluster.services.store import Service
from tests.pipelines.media.downloads.download_jobs import DownloadJobs, RecordedEvents
from tests.support.services.fake_arr import (
    LONG_AGO,
    FakeArr,
    fake_arr,
    library_movie,
    library_series,
    queue_row,
)
from tests.support.services.fake_services import KEY
from tests.support.services.stub_server import StubRequest, StubResponse, html_page, json_response, stub_server

pytestmark = pytest.mark.usefixtures("published")

HANDLING: dict[str, Any] = {"config/downloadclient": {"id": 1, "autoRedownloadFailed": False}}
BLOCKED = {
    "status": "completed",
    "trackedDownloadState": "importBlocked",
    "trackedDownloadStatus": "warning",
    "statusMessages": [{"title": "b.mkv", "messages": ['No "files" found are eligible for import 🎬']}],
}
FAILED = {"status": "failed", "trackedDownloadState": "failedPending", "trackedDownloadStatus": "error"}
RECOVER = """
import asyncio
from tests.pipelines.media.downloads.download_jobs import DownloadJobs
from cluster.db import get_database
asyncio.run(DownloadJobs(get_database()).recover())
"""


def soon(**delta: float) -> str:
    return (now() + timedelta(**delta)).isoformat().replace("+00:00", "Z")


def add_download(sonarr: FakeArr, **columns: Any) -> None:
    """Add a download with two episodes, which are two rows of the queue."""
    sonarr.add_row("series", library_series("Breaking Bad", 81189, 3))
    for episode in (12, 13):
        ids = {"seriesId": 3, "episodeId": episode, "downloadId": "SABnzbd_nzo_pack"}
        sonarr.add_row("queue", queue_row("Breaking.Bad.S01", episode, **ids, **columns))
        grabbed = {"eventType": "grabbed", "sourceTitle": "Breaking.Bad.S01", "date": LONG_AGO}
        sonarr.add_row("history", {**grabbed, **ids})


async def watch_until_stuck(jobs: DownloadJobs, sonarr: FakeArr, **policy: Any) -> Service:
    """Add a Sonarr whose download is not imported, and watch until a recovery is queued."""
    add_download(sonarr, **BLOCKED)
    service = await jobs.add("TV", "sonarr", sonarr.url, KEY)
    await jobs.policy(**{"strikes": 2, "stuck_minutes": 0, **policy})
    assert (await jobs.watch())["recover_job_id"] is None
    assert (await jobs.watch())["recover_job_id"]
    return service


def deletions(sonarr: FakeArr) -> list[StubRequest]:
    return [request for request in sonarr.requests if request.method == "DELETE"]


async def test_a_download_that_is_not_imported_is_replaced(jobs: DownloadJobs, published: RecordedEvents) -> None:
    async with fake_arr("sonarr", **HANDLING) as sonarr:
        await watch_until_stuck(jobs, sonarr)
        await jobs.recover(dry_run=True)
        assert (deletions(sonarr), sonarr.commands) == ([], [])
        await jobs.recover(dry_run=False)
        (deletion,) = deletions(sonarr)
        assert deletion.query == {"removeFromClient": "true", "blocklist": "true", "skipRedownload": "true"}
        assert [row["sourceTitle"] for row in sonarr.rows("blocklist")] == ["Breaking.Bad.S01"]
        assert sonarr.commands == [{"name": "EpisodeSearch", "episodeIds": [12, 13]}]
        planned, done = await jobs.recoveries()
        assert [(recovery.decision, recovery.outcome, recovery.searched) for recovery in (planned, done)] == [
            ("replace", "dry_run", False),
            ("replace", "done", True),
        ]
        assert 'No "files" found are eligible for import 🎬' in done.reason
        assert done.policy["strikes"] == 2
        for number, episode in enumerate((12, 13), 1):
            sonarr.rows("queue").clear()
            imported = {"seriesId": 3, "episodeId": episode, "downloadId": "other", "sourceTitle": "Other"}
            event = {"date": soon(seconds=number), "eventType": "downloadFolderImported"}
            series = sonarr.rows("series")[0]
            sonarr.add_row("history", {**imported, **event, "series": {"id": 3, "title": series["title"], "tags": []}})
            await jobs.watch()
        assert published.of("content.added") == [
            {"request_id": None, "content_id": "3", "title": "Breaking Bad", "type": "series"}
        ]
        assert (await jobs.recoveries())[-1].recovered_at is not None


@pytest.mark.parametrize(("for_interactive", "commands"), [(True, 0), (False, 1)])
async def test_no_search_is_sent_if_sonarr_searches_by_itself(
    jobs: DownloadJobs, for_interactive: bool, commands: int
) -> None:
    """Sonarr may skip downloads that a person chose. Forgearr cannot tell them apart, so then it searches too."""
    options = {"id": 1, "autoRedownloadFailed": True, "autoRedownloadFailedFromInteractiveSearch": for_interactive}
    resources: dict[str, Any] = {"config/downloadclient": options}
    async with fake_arr("sonarr", **resources) as sonarr:
        await watch_until_stuck(jobs, sonarr)
        await jobs.recover()
        (deletion,) = deletions(sonarr)
        assert (deletion.query["skipRedownload"], len(sonarr.commands)) == (str(not for_interactive).lower(), commands)
        assert [recovery.searched for recovery in await jobs.recoveries()] == [True]


@pytest.mark.parametrize(
    ("tag", "policy", "decision"),
    [
        ("Keep", {"protected_tags": ["keep"]}, "leave"),
        ("", {"leave_messages": ['NO "FILES"']}, "leave"),
        ("", {"max_per_hour": 0}, "wait"),
    ],
)
async def test_the_policy_prevents_changes(jobs: DownloadJobs, tag: str, policy: dict[str, Any], decision: str) -> None:
    async with fake_arr("sonarr", **HANDLING) as sonarr:
        if tag:
            sonarr.add_row("tag", {"id": 5, "label": tag})
        await watch_with_tags(jobs, sonarr, [5] if tag else [], policy)
        for _ in range(2):
            await jobs.recover()
        assert (deletions(sonarr), sonarr.commands) == ([], [])
        assert await jobs.decisions() == [(decision, "noted")]  # the decision is recorded once


async def watch_with_tags(jobs: DownloadJobs, sonarr: FakeArr, tags: list[int], policy: dict[str, Any]) -> None:
    series = library_series("Breaking Bad", 81189, 3, tags=tags)
    series_summary = {"id": 3, "title": "Breaking Bad", "tags": tags}
    sonarr.add_row("series", series)
    sonarr.add_row(
        "queue", queue_row("Breaking.Bad.S01", 12, seriesId=3, episodeId=12, series=series_summary, **BLOCKED)
    )
    await jobs.add("TV", "sonarr", sonarr.url, KEY)
    await jobs.policy(strikes=1, stuck_minutes=0, **policy)
    await jobs.watch()


async def test_actions_per_hour_are_limited(jobs: DownloadJobs) -> None:
    async with fake_arr("radarr", **HANDLING) as radarr:
        for number in range(1, 5):
            radarr.add_row("movie", library_movie(f"Movie {number}", 600 + number, number))
            radarr.add_row("queue", queue_row(f"Movie.{number}", number, movieId=number, **FAILED))
        await jobs.add("Films", "radarr", radarr.url, KEY)
        await jobs.policy(grace_minutes=0, max_per_hour=3)
        await jobs.watch()
        for _ in range(3):
            await jobs.recover()
        assert len(deletions(radarr)) == 3
        assert [command["movieIds"] for command in radarr.commands] == [[1], [2], [3]]
        assert await jobs.decisions() == [*3 * [("replace", "done")], ("wait", "noted")]


async def test_a_failure_is_published_once_and_left_to_sonarr_during_the_grace_period(
    jobs: DownloadJobs, published: RecordedEvents
) -> None:
    async with fake_arr("sonarr", **HANDLING) as sonarr:
        add_download(sonarr, **FAILED, errorMessage="Aborted")
        await jobs.add("TV", "sonarr", sonarr.url, KEY)
        await jobs.policy()
        for _ in range(2):
            await jobs.watch()
            await jobs.recover()
        assert published.of("download.failed") == [
            {"download_id": "SABnzbd_nzo_pack", "title": "Breaking.Bad.S01", "reason": "Aborted"}
        ]
        assert (await jobs.decisions(), deletions(sonarr)) == ([("wait", "noted")], [])


async def test_a_stalled_torrent_gets_strikes_and_a_usenet_download_waits(jobs: DownloadJobs) -> None:
    async with fake_arr("sonarr", **HANDLING) as sonarr:
        sonarr.add_row("queue", queue_row("Usenet", 1, seriesId=3, episodeId=1))
        sonarr.add_row("queue", queue_row("Torrent", 2, seriesId=3, episodeId=2, protocol="torrent", status="warning"))
        sonarr.add_row("queue", queue_row("Moving", 3, seriesId=3, episodeId=3, protocol="torrent"))
        await jobs.add("TV", "sonarr", sonarr.url, KEY)
        await jobs.policy(strikes=2, stuck_minutes=0)
        for poll in range(4):
            sonarr.rows("queue")[2]["sizeleft"] = 1e9 - poll
            await jobs.watch()
        rows = {row.title: row for row in (await jobs.downloads()).values()}
        assert {title: (row.state, row.strikes) for title, row in rows.items()} == {
            "Usenet": ("waiting", 0),
            "Torrent": ("running", 3),
            "Moving": ("running", 0),
        }
        await jobs.recover()
        assert [recovery.title for recovery in await jobs.recoveries()] == ["Torrent"]


async def test_no_torrent_gets_strikes_while_all_are_stalled(jobs: DownloadJobs) -> None:
    async with fake_arr("sonarr", **HANDLING) as sonarr:
        for number in (1, 2):
            columns = {"seriesId": 3, "episodeId": number, "protocol": "torrent", "status": "warning"}
            sonarr.add_row("queue", queue_row(f"Torrent {number}", number, **columns))
        await jobs.add("TV", "sonarr", sonarr.url, KEY)
        await jobs.policy(strikes=1, stuck_minutes=0)
        for _ in range(3):
            await jobs.watch()
        assert {row.strikes for row in (await jobs.downloads()).values()} == {0}
        sonarr.rows("queue").pop()
        for _ in range(2):
            await jobs.watch()
        assert [row.strikes for row in (await jobs.downloads()).values()] == [2]


async def test_a_download_that_made_progress_is_not_removed(jobs: DownloadJobs) -> None:
    def before(request: StubRequest) -> StubResponse | None:
        return json_response({"message": "Not now"}, 503) if request.method == "DELETE" else None

    async with fake_arr("sonarr", before, **HANDLING) as sonarr:
        sonarr.add_row("queue", queue_row("Torrent", 1, seriesId=3, episodeId=1, protocol="torrent", status="warning"))
        await jobs.add("TV", "sonarr", sonarr.url, KEY)
        await jobs.policy(strikes=1, stuck_minutes=0)
        for _ in range(2):
            await jobs.watch()
        await jobs.recover()
        (recovery,) = await jobs.recoveries()
        assert (recovery.decision, recovery.outcome, len(deletions(sonarr))) == ("replace", "begun", 1)
        sonarr.rows("queue")[0]["sizeleft"] = 5e8
        await jobs.resume()
        assert (await jobs.decisions(), len(deletions(sonarr))) == ([("replace", "overtaken")], 1)


@pytest.mark.parametrize("was_deleted", [False, True])
async def test_a_recovery_after_a_killed_worker_repeats_no_action(jobs: DownloadJobs, was_deleted: bool) -> None:
    """The worker is killed after it requested the removal, before or after Sonarr has carried it out."""
    reached, hangs = asyncio.Event(), True
    servers: list[FakeArr] = []

    def before(request: StubRequest) -> StubResponse | None:
        if request.method != "DELETE" or not hangs:
            return None
        if was_deleted:
            servers[0](request)
        reached.set()
        return StubResponse(hangs=True)

    async with fake_arr("sonarr", before, **HANDLING) as sonarr:
        servers.append(sonarr)
        await watch_until_stuck(jobs, sonarr)
        worker = await asyncio.create_subprocess_exec(sys.executable, "-c", RECOVER, env=os.environ)
        await reached.wait()
        worker.kill()
        await worker.wait()
        assert await jobs.decisions() == [("replace", "begun")]
        hangs = False
        await jobs.recover()
        assert await jobs.decisions() == [("replace", "done")]
        assert len(deletions(sonarr)) == (1 if was_deleted else 2)
        assert len(sonarr.rows("blocklist")) == 1
        assert len(sonarr.commands) == 1
        await jobs.recover()
        assert (len(sonarr.commands), len(await jobs.recoveries())) == (1, 1)


@pytest.mark.parametrize("moved", [False, True])
async def test_a_download_removed_by_somebody_else_is_not_searched_for(jobs: DownloadJobs, moved: bool) -> None:
    """A person removes the download before Forgearr does, or the row now points to another service."""
    unavailable = True

    def before(request: StubRequest) -> StubResponse | None:
        return (
            json_response({"message": "Not now"}, 503)
            if unavailable and request.path.endswith("/config/downloadclient")
            else None
        )

    async with (
        fake_arr("sonarr", before, **HANDLING) as sonarr,
        fake_arr("sonarr", **HANDLING) as another,
    ):
        service = await watch_until_stuck(jobs, sonarr)
        await jobs.recover()
        assert await jobs.decisions() == [("replace", "begun")]
        if moved:
            add_download(another, **BLOCKED)
            async with jobs.database.transaction() as session:
                stored = await service_store.get(session, service.id)
                await service_store.change(session, stored, {"url": another.url, "api_key": KEY})
        sonarr.rows("queue").clear()
        unavailable = False
        await jobs.resume()
        assert await jobs.decisions() == [("replace", "overtaken")]
        assert [*sonarr.commands, *another.commands, *deletions(sonarr), *deletions(another)] == []


@pytest.mark.parametrize("polls", [1, 2])
async def test_a_download_that_disappears_just_before_its_removal_is_not_searched_for(
    jobs: DownloadJobs, polls: int
) -> None:
    """It disappears after the first read of the queue, or after the second."""
    remaining = 0

    def before(request: StubRequest) -> StubResponse | None:
        nonlocal remaining
        if not remaining or request.method != "GET" or not request.path.endswith("/queue"):
            return None
        response, remaining = sonarr(request), remaining - 1
        if not remaining:
            sonarr.rows("queue").clear()
        return response

    async with fake_arr("sonarr", before, **HANDLING) as sonarr:
        await watch_until_stuck(jobs, sonarr)
        remaining = polls
        await jobs.recover()
        assert (len(deletions(sonarr)), await jobs.decisions()) == (polls - 1, [("replace", "overtaken")])
        assert sonarr.commands == []


async def test_a_begun_recovery_ends_when_the_policy_no_longer_allows_actions(jobs: DownloadJobs) -> None:
    def before(request: StubRequest) -> StubResponse | None:
        return json_response({"message": "Not now"}, 503) if request.method == "DELETE" else None

    async with fake_arr("sonarr", before, **HANDLING) as sonarr:
        await watch_until_stuck(jobs, sonarr)
        await jobs.recover()
        await jobs.policy(dry_run=True, strikes=100)
        await jobs.resume()
        (recovery,) = await jobs.recoveries()
        assert (recovery.outcome, recovery.error) == (
            "overtaken",
            "The policy has changed, and does not allow actions any more.",
        )
        assert (await jobs.watch())["recover_job_id"] is None


async def test_a_recovery_started_by_a_person_continues_under_a_dry_run_policy(jobs: DownloadJobs) -> None:
    unavailable = True

    def before(request: StubRequest) -> StubResponse | None:
        return json_response({"message": "Not now"}, 503) if unavailable and request.method == "DELETE" else None

    async with fake_arr("sonarr", before, **HANDLING) as sonarr:
        await watch_until_stuck(jobs, sonarr, dry_run=True)
        await jobs.recover(dry_run=False)
        assert await jobs.decisions() == [("replace", "begun")]
        unavailable = False
        await jobs.resume()
        assert (len(deletions(sonarr)), len(sonarr.commands)) == (2, 1)


async def test_a_tag_added_later_protects_a_download(jobs: DownloadJobs) -> None:
    async with fake_arr("sonarr", **HANDLING) as sonarr:
        await watch_until_stuck(jobs, sonarr, protected_tags=["keep"])
        sonarr.add_row("tag", {"id": 5, "label": "Keep"})
        for row in sonarr.rows("queue"):
            row["series"] = {"id": 3, "title": "Breaking Bad", "tags": [5]}
        await jobs.recover()
        (recovery,) = await jobs.recoveries()
        assert (recovery.outcome, recovery.error, deletions(sonarr)) == ("overtaken", "protected by 'keep'", [])


async def test_a_begun_recovery_is_not_decided_again(jobs: DownloadJobs) -> None:
    def before(request: StubRequest) -> StubResponse | None:
        return json_response({"message": "Not now"}, 503) if request.method == "DELETE" else None

    async with fake_arr("sonarr", before, **HANDLING) as sonarr:
        await watch_until_stuck(jobs, sonarr)
        for _ in range(3):
            await jobs.recover(dry_run=False)
        assert await jobs.decisions() == [("replace", "begun"), ("wait", "noted")]


async def test_a_changed_policy_stops_recoveries_that_have_not_begun(jobs: DownloadJobs) -> None:
    """An administrator switches to a dry run during the first removal."""
    executor = ThreadPoolExecutor(1)

    def before(request: StubRequest) -> StubResponse | None:
        if request.method == "DELETE":
            executor.submit(run_with_database, stop).result()
        return None

    async def stop(database: Database) -> None:
        await DownloadJobs(database).policy(dry_run=True)

    async with fake_arr("radarr", before, **HANDLING) as radarr:
        for number in (1, 2):
            radarr.add_row("movie", library_movie(f"Movie {number}", 600 + number, number))
            radarr.add_row("queue", queue_row(f"Movie.{number}", number, movieId=number, **FAILED))
        await jobs.add("Films", "radarr", radarr.url, KEY)
        await jobs.policy(grace_minutes=0)
        await jobs.watch()
        await jobs.recover()
        assert (len(deletions(radarr)), await jobs.decisions()) == (
            1,
            [("replace", "done"), ("replace", "overtaken")],
        )


async def test_a_failure_that_was_missing_for_one_poll_is_recovered(jobs: DownloadJobs) -> None:
    """Sonarr's queue is empty for a moment, such as just after its start."""
    async with fake_arr("sonarr", **HANDLING) as sonarr:
        add_download(sonarr, **FAILED)
        await jobs.add("TV", "sonarr", sonarr.url, KEY)
        await jobs.policy(grace_minutes=0)
        await jobs.watch()
        rows = list(sonarr.rows("queue"))
        sonarr.rows("queue").clear()
        await jobs.watch()
        sonarr.rows("queue").extend(rows)
        await jobs.watch()
        await jobs.recover()
        assert (len(deletions(sonarr)), await jobs.decisions()) == (1, [("replace", "done")])


async def test_an_unavailable_service_is_tried_again_later(jobs: DownloadJobs) -> None:
    unavailable = True

    def before(request: StubRequest) -> StubResponse | None:
        return json_response({"message": "Not now"}, 503) if unavailable and request.method == "DELETE" else None

    async with fake_arr("sonarr", before, **HANDLING) as sonarr:
        await watch_until_stuck(jobs, sonarr)
        await jobs.recover()
        (recovery,) = await jobs.recoveries()
        assert (recovery.outcome, recovery.again_at is not None) == ("begun", True)
        assert "is not available" in (recovery.error or "")
        unavailable = False
        await jobs.recover()
        assert await jobs.decisions() == [("replace", "begun")]  # not at once
        await jobs.resume()
        assert [(*decision, len(sonarr.commands)) for decision in await jobs.decisions()] == [("replace", "done", 1)]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("queue", {"records": None}),
        ("queue", {"records": [{"id": "x' OR 1=1"}]}),
        ("queue", {"records": [{"id": 1, "sizeleft": 1e300}]}),
        ("queue", {"records": [{"id": 1, "downloadId": "x" * 301}]}),
        ("queue", []),
        ("history/since", [{"id": 1}]),
        ("history/since", [{"id": 1, "date": "yesterday"}]),
        ("tag", {"error": "inside"}),
    ],
)
async def test_an_invalid_response_is_reported(jobs: DownloadJobs, path: str, body: Any) -> None:
    def handle(request: StubRequest) -> StubResponse:
        endpoint = request.path.removeprefix("/api/v3/")
        if endpoint == path:
            return json_response(body)
        return json_response({"records": []} if endpoint == "queue" else [])

    async with stub_server(handle) as server:
        service = await jobs.add("TV", "sonarr", server.url, KEY)
        tracker = service.connector.download_tracker
        assert tracker
        with pytest.raises(BadResponse, match="TV answers with something unexpected"):
            async with service_store.open_client(jobs.database, service) as client:
                await tracker.poll(client, TrackingPosition(service.connected_as_of, now()))
        result = await jobs.watch()
        assert (result["looked_at"], list(result["unseen"])) == (0, ["TV"])


async def test_an_unavailable_service_does_not_hide_others(jobs: DownloadJobs) -> None:
    async with stub_server(lambda request: html_page("Welcome")) as other, fake_arr("radarr", **HANDLING) as radarr:
        await jobs.add("TV", "sonarr", other.url, KEY)
        await jobs.add("Films", "radarr", radarr.url, KEY)
        result = await jobs.watch()
        assert (result["looked_at"], list(result["unseen"])) == (1, ["TV"])
