"""Watching the downloads of fakes of Sonarr and Radarr, and recovering what is stuck or has failed."""

import asyncio
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from cluster.db import Database, now, with_own_database
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


def pack(sonarr: FakeArr, **more: Any) -> None:
    """A download of two episodes, which are two rows of the queue."""
    sonarr.add_row("series", library_series("Breaking Bad", 81189, 3))
    for episode in (12, 13):
        told = {"seriesId": 3, "episodeId": episode, "downloadId": "SABnzbd_nzo_pack"}
        sonarr.add_row("queue", queue_row("Breaking.Bad.S01", episode, **told, **more))
        grabbed = {"eventType": "grabbed", "sourceTitle": "Breaking.Bad.S01", "date": LONG_AGO}
        sonarr.add_row("history", {**grabbed, **told})


async def stuck(jobs: DownloadJobs, sonarr: FakeArr, **policy: Any) -> Service:
    """Sonarr with a download that is not imported, after the looks that make it a case."""
    pack(sonarr, **BLOCKED)
    service = await jobs.add("TV", "sonarr", sonarr.url, KEY)
    await jobs.policy(**{"strikes": 2, "stuck_minutes": 0, **policy})
    assert (await jobs.watch())["recover_job_id"] is None
    assert (await jobs.watch())["recover_job_id"]
    return service


def deletions(sonarr: FakeArr) -> list[StubRequest]:
    return [request for request in sonarr.requests if request.method == "DELETE"]


async def test_what_is_not_imported_is_replaced_and_recovers(jobs: DownloadJobs, published: RecordedEvents) -> None:
    async with fake_arr("sonarr", **HANDLING) as sonarr:
        await stuck(jobs, sonarr)
        await jobs.recover(dry_run=True)
        assert (deletions(sonarr), sonarr.commands) == ([], [])
        await jobs.recover(dry_run=False)
        (deleted,) = deletions(sonarr)
        assert deleted.query == {"removeFromClient": "true", "blocklist": "true", "skipRedownload": "true"}
        assert [row["sourceTitle"] for row in sonarr.rows("blocklist")] == ["Breaking.Bad.S01"]
        assert sonarr.commands == [{"name": "EpisodeSearch", "episodeIds": [12, 13]}]
        said, done = await jobs.recoveries()
        assert [(one.decision, one.outcome, one.searched) for one in (said, done)] == [
            ("replace", "dry_run", False),
            ("replace", "done", True),
        ]
        assert 'No "files" found are eligible for import 🎬' in done.reason
        assert done.policy["strikes"] == 2
        for number, episode in enumerate((12, 13), 1):
            sonarr.rows("queue").clear()
            imported = {"seriesId": 3, "episodeId": episode, "downloadId": "other", "sourceTitle": "Other"}
            told = {"date": soon(seconds=number), "eventType": "downloadFolderImported"}
            series = sonarr.rows("series")[0]
            sonarr.add_row("history", {**imported, **told, "series": {"id": 3, "title": series["title"], "tags": []}})
            await jobs.watch()
        assert published.of("content.added") == [
            {"request_id": None, "content_id": "3", "title": "Breaking Bad", "type": "series"}
        ]
        assert (await jobs.recoveries())[-1].recovered_at is not None


@pytest.mark.parametrize(("for_people", "commands"), [(True, 0), (False, 1)])
async def test_who_searches_by_itself_is_not_told_to(jobs: DownloadJobs, for_people: bool, commands: int) -> None:
    """Unless that leaves out what a person has chosen: nobody can tell whether this was."""
    options = {"id": 1, "autoRedownloadFailed": True, "autoRedownloadFailedFromInteractiveSearch": for_people}
    resources: dict[str, Any] = {"config/downloadclient": options}
    async with fake_arr("sonarr", **resources) as sonarr:
        await stuck(jobs, sonarr)
        await jobs.recover()
        (deleted,) = deletions(sonarr)
        assert (deleted.query["skipRedownload"], len(sonarr.commands)) == (str(not for_people).lower(), commands)
        assert [one.searched for one in await jobs.recoveries()] == [True]


@pytest.mark.parametrize(
    ("tag", "policy", "decision"),
    [
        ("Keep", {"protected_tags": ["keep"]}, "leave"),
        ("", {"leave_messages": ['NO "FILES"']}, "leave"),
        ("", {"max_per_hour": 0}, "wait"),
    ],
)
async def test_what_the_policy_forbids_is_not_touched(
    jobs: DownloadJobs, tag: str, policy: dict[str, Any], decision: str
) -> None:
    async with fake_arr("sonarr", **HANDLING) as sonarr:
        if tag:
            sonarr.add_row("tag", {"id": 5, "label": tag})
        await stuck_with_tags(jobs, sonarr, [5] if tag else [], policy)
        for _ in range(2):
            await jobs.recover()
        assert (deletions(sonarr), sonarr.commands) == ([], [])
        assert await jobs.decisions() == [(decision, "noted")]  # it is said once


async def stuck_with_tags(jobs: DownloadJobs, sonarr: FakeArr, tags: list[int], policy: dict[str, Any]) -> None:
    series = library_series("Breaking Bad", 81189, 3, tags=tags)
    shown = {"id": 3, "title": "Breaking Bad", "tags": tags}
    sonarr.add_row("series", series)
    sonarr.add_row("queue", queue_row("Breaking.Bad.S01", 12, seriesId=3, episodeId=12, series=shown, **BLOCKED))
    await jobs.add("TV", "sonarr", sonarr.url, KEY)
    await jobs.policy(strikes=1, stuck_minutes=0, **policy)
    await jobs.watch()


async def test_an_hour_sees_no_more_than_its_cap(jobs: DownloadJobs) -> None:
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


async def test_a_failure_is_told_once_and_left_to_sonarr_for_a_while(
    jobs: DownloadJobs, published: RecordedEvents
) -> None:
    async with fake_arr("sonarr", **HANDLING) as sonarr:
        pack(sonarr, **FAILED, errorMessage="Aborted")
        await jobs.add("TV", "sonarr", sonarr.url, KEY)
        await jobs.policy()
        for _ in range(2):
            await jobs.watch()
            await jobs.recover()
        assert published.of("download.failed") == [
            {"download_id": "SABnzbd_nzo_pack", "title": "Breaking.Bad.S01", "reason": "Aborted"}
        ]
        assert (await jobs.decisions(), deletions(sonarr)) == ([("wait", "noted")], [])


async def test_what_comes_from_usenet_waits_and_a_torrent_can_be_stuck(jobs: DownloadJobs) -> None:
    async with fake_arr("sonarr", **HANDLING) as sonarr:
        sonarr.add_row("queue", queue_row("Usenet", 1, seriesId=3, episodeId=1))
        sonarr.add_row("queue", queue_row("Torrent", 2, seriesId=3, episodeId=2, protocol="torrent", status="warning"))
        sonarr.add_row("queue", queue_row("Moving", 3, seriesId=3, episodeId=3, protocol="torrent"))
        await jobs.add("TV", "sonarr", sonarr.url, KEY)
        await jobs.policy(strikes=2, stuck_minutes=0)
        for looks in range(4):
            sonarr.rows("queue")[2]["sizeleft"] = 1e9 - looks
            await jobs.watch()
        rows = {row.title: row for row in (await jobs.downloads()).values()}
        assert {title: (row.state, row.strikes) for title, row in rows.items()} == {
            "Usenet": ("waiting", 0),
            "Torrent": ("running", 3),
            "Moving": ("running", 0),
        }
        await jobs.recover()
        assert [one.title for one in await jobs.recoveries()] == ["Torrent"]


async def test_where_nothing_moves_at_all_no_torrent_is_to_blame(jobs: DownloadJobs) -> None:
    async with fake_arr("sonarr", **HANDLING) as sonarr:
        for number in (1, 2):
            told = {"seriesId": 3, "episodeId": number, "protocol": "torrent", "status": "warning"}
            sonarr.add_row("queue", queue_row(f"Torrent {number}", number, **told))
        await jobs.add("TV", "sonarr", sonarr.url, KEY)
        await jobs.policy(strikes=1, stuck_minutes=0)
        for _ in range(3):
            await jobs.watch()
        assert {row.strikes for row in (await jobs.downloads()).values()} == {0}
        sonarr.rows("queue").pop()
        for _ in range(2):
            await jobs.watch()
        assert [row.strikes for row in (await jobs.downloads()).values()] == [2]


async def test_what_has_got_on_meanwhile_is_kept(jobs: DownloadJobs) -> None:
    def before(request: StubRequest) -> StubResponse | None:
        return json_response({"message": "Not now"}, 503) if request.method == "DELETE" else None

    async with fake_arr("sonarr", before, **HANDLING) as sonarr:
        sonarr.add_row("queue", queue_row("Torrent", 1, seriesId=3, episodeId=1, protocol="torrent", status="warning"))
        await jobs.add("TV", "sonarr", sonarr.url, KEY)
        await jobs.policy(strikes=1, stuck_minutes=0)
        for _ in range(2):
            await jobs.watch()
        await jobs.recover()
        (one,) = await jobs.recoveries()
        assert (one.decision, one.outcome, len(deletions(sonarr))) == ("replace", "begun", 1)
        sonarr.rows("queue")[0]["sizeleft"] = 5e8
        await jobs.resume()
        assert (await jobs.decisions(), len(deletions(sonarr))) == ([("replace", "overtaken")], 1)


@pytest.mark.parametrize("acted", [False, True])
async def test_a_worker_that_dies_repeats_nothing(jobs: DownloadJobs, acted: bool) -> None:
    """It is killed when it has asked for a removal, which Sonarr has not done yet, or has."""
    reached, dying = asyncio.Event(), True
    served: list[FakeArr] = []

    def before(request: StubRequest) -> StubResponse | None:
        if request.method != "DELETE" or not dying:
            return None
        if acted:
            served[0](request)
        reached.set()
        return StubResponse(hangs=True)

    async with fake_arr("sonarr", before, **HANDLING) as sonarr:
        served.append(sonarr)
        await stuck(jobs, sonarr)
        worker = await asyncio.create_subprocess_exec(sys.executable, "-c", RECOVER, env=os.environ)
        await reached.wait()
        worker.kill()
        await worker.wait()
        assert await jobs.decisions() == [("replace", "begun")]
        dying = False
        await jobs.recover()
        assert await jobs.decisions() == [("replace", "done")]
        assert len(deletions(sonarr)) == (1 if acted else 2)
        assert len(sonarr.rows("blocklist")) == 1
        assert len(sonarr.commands) == 1
        await jobs.recover()
        assert (len(sonarr.commands), len(await jobs.recoveries())) == (1, 1)


@pytest.mark.parametrize("moved", [False, True])
async def test_what_was_not_removed_by_us_is_not_searched_for(jobs: DownloadJobs, moved: bool) -> None:
    """A person removes it before we have begun, or the service at this address is another one by then."""
    away = True

    def before(request: StubRequest) -> StubResponse | None:
        return (
            json_response({"message": "Not now"}, 503)
            if away and request.path.endswith("/config/downloadclient")
            else None
        )

    async with (
        fake_arr("sonarr", before, **HANDLING) as sonarr,
        fake_arr("sonarr", **HANDLING) as another,
    ):
        service = await stuck(jobs, sonarr)
        await jobs.recover()
        assert await jobs.decisions() == [("replace", "begun")]
        if moved:
            pack(another, **BLOCKED)
            async with jobs.database.transaction() as session:
                moved_one = await service_store.get(session, service.id)
                await service_store.change(session, moved_one, {"url": another.url, "api_key": KEY})
        sonarr.rows("queue").clear()
        away = False
        await jobs.resume()
        assert await jobs.decisions() == [("replace", "overtaken")]
        assert [*sonarr.commands, *another.commands, *deletions(sonarr), *deletions(another)] == []


@pytest.mark.parametrize("looks", [1, 2])
async def test_what_goes_by_itself_just_before_it_is_removed_is_not_searched_for(
    jobs: DownloadJobs, looks: int
) -> None:
    """It is seen when it is looked at, or even when it is about to be asked for."""
    left = 0

    def before(request: StubRequest) -> StubResponse | None:
        nonlocal left
        if not left or request.method != "GET" or not request.path.endswith("/queue"):
            return None
        told, left = sonarr(request), left - 1
        if not left:
            sonarr.rows("queue").clear()
        return told

    async with fake_arr("sonarr", before, **HANDLING) as sonarr:
        await stuck(jobs, sonarr)
        left = looks
        await jobs.recover()
        assert (len(deletions(sonarr)), await jobs.decisions()) == (looks - 1, [("replace", "overtaken")])
        assert sonarr.commands == []


async def test_what_was_begun_ends_when_the_policy_does_not_act_any_more(jobs: DownloadJobs) -> None:
    def before(request: StubRequest) -> StubResponse | None:
        return json_response({"message": "Not now"}, 503) if request.method == "DELETE" else None

    async with fake_arr("sonarr", before, **HANDLING) as sonarr:
        await stuck(jobs, sonarr)
        await jobs.recover()
        await jobs.policy(dry_run=True, strikes=100)
        await jobs.resume()
        (one,) = await jobs.recoveries()
        assert (one.outcome, one.error) == ("overtaken", "The policy has changed, and does not allow actions any more.")
        assert (await jobs.watch())["recover_job_id"] is None


async def test_what_a_person_wished_goes_on_whatever_the_policy_says(jobs: DownloadJobs) -> None:
    away = True

    def before(request: StubRequest) -> StubResponse | None:
        return json_response({"message": "Not now"}, 503) if away and request.method == "DELETE" else None

    async with fake_arr("sonarr", before, **HANDLING) as sonarr:
        await stuck(jobs, sonarr, dry_run=True)
        await jobs.recover(dry_run=False)
        assert await jobs.decisions() == [("replace", "begun")]
        away = False
        await jobs.resume()
        assert (len(deletions(sonarr)), len(sonarr.commands)) == (2, 1)


async def test_a_tag_protects_what_is_about_to_be_removed(jobs: DownloadJobs) -> None:
    async with fake_arr("sonarr", **HANDLING) as sonarr:
        await stuck(jobs, sonarr, protected_tags=["keep"])
        sonarr.add_row("tag", {"id": 5, "label": "Keep"})
        for row in sonarr.rows("queue"):
            row["series"] = {"id": 3, "title": "Breaking Bad", "tags": [5]}
        await jobs.recover()
        (one,) = await jobs.recoveries()
        assert (one.outcome, one.error, deletions(sonarr)) == ("overtaken", "protected by 'keep'", [])


async def test_what_was_begun_is_not_decided_again(jobs: DownloadJobs) -> None:
    def before(request: StubRequest) -> StubResponse | None:
        return json_response({"message": "Not now"}, 503) if request.method == "DELETE" else None

    async with fake_arr("sonarr", before, **HANDLING) as sonarr:
        await stuck(jobs, sonarr)
        for _ in range(3):
            await jobs.recover(dry_run=False)
        assert await jobs.decisions() == [("replace", "begun"), ("wait", "noted")]


async def test_a_policy_that_changes_stops_what_has_not_begun(jobs: DownloadJobs) -> None:
    """An administrator sees a wrong removal, and says that nothing is to be done."""
    room = ThreadPoolExecutor(1)

    def before(request: StubRequest) -> StubResponse | None:
        if request.method == "DELETE":
            room.submit(asyncio.run, with_own_database(stop)).result()
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


async def test_a_failure_that_was_out_of_sight_is_dealt_with(jobs: DownloadJobs) -> None:
    """Sonarr has forgotten its queue, such as when it has just started."""
    async with fake_arr("sonarr", **HANDLING) as sonarr:
        pack(sonarr, **FAILED)
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


async def test_a_service_that_goes_away_is_asked_again_later(jobs: DownloadJobs) -> None:
    away = True

    def before(request: StubRequest) -> StubResponse | None:
        return json_response({"message": "Not now"}, 503) if away and request.method == "DELETE" else None

    async with fake_arr("sonarr", before, **HANDLING) as sonarr:
        await stuck(jobs, sonarr)
        await jobs.recover()
        (one,) = await jobs.recoveries()
        assert (one.outcome, one.again_at is not None) == ("begun", True)
        assert "is not available" in (one.error or "")
        away = False
        await jobs.recover()
        assert await jobs.decisions() == [("replace", "begun")]  # not at once
        await jobs.resume()
        assert [(*told, len(sonarr.commands)) for told in await jobs.decisions()] == [("replace", "done", 1)]


@pytest.mark.parametrize(
    ("path", "answer"),
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
async def test_an_answer_that_makes_no_sense_is_said_to_be_one(jobs: DownloadJobs, path: str, answer: Any) -> None:
    def handle(request: StubRequest) -> StubResponse:
        end = request.path.removeprefix("/api/v3/")
        if end == path:
            return json_response(answer)
        return json_response({"records": []} if end == "queue" else [])

    async with stub_server(handle) as server:
        service = await jobs.add("TV", "sonarr", server.url, KEY)
        following = service.connector.download_tracker
        assert following
        with pytest.raises(BadResponse, match="TV answers with something unexpected"):
            async with service_store.open_client(jobs.database, service) as client:
                await following.poll(client, TrackingPosition(service.connected_as_of, now()))
        told = await jobs.watch()
        assert (told["looked_at"], list(told["unseen"])) == (0, ["TV"])


async def test_one_service_that_is_down_hides_no_other(jobs: DownloadJobs) -> None:
    async with stub_server(lambda request: html_page("Welcome")) as other, fake_arr("radarr", **HANDLING) as radarr:
        await jobs.add("TV", "sonarr", other.url, KEY)
        await jobs.add("Films", "radarr", radarr.url, KEY)
        told = await jobs.watch()
        assert (told["looked_at"], list(told["unseen"])) == (1, ["TV"])
