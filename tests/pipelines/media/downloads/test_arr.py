"""Following Sonarr and Radarr, and mending what is stuck or has failed there, with stand-ins that have a memory."""

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
from tests.pipelines.media.downloads.conftest import Desk, Ear
from tests.support.services.fake_arr import (
    LONG_AGO,
    ArrStandIn,
    arr_standing_in,
    kept_movie,
    kept_series,
    queued,
)
from tests.support.services.fake_services import KEY
from tests.support.services.stub_server import Asked, Reply, page, standing_in, telling

pytestmark = pytest.mark.usefixtures("ear")

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
from tests.pipelines.media.downloads.conftest import Desk
from cluster.db import get_database
asyncio.run(Desk(get_database()).recover())
"""


def soon(**delta: float) -> str:
    return (now() + timedelta(**delta)).isoformat().replace("+00:00", "Z")


def pack(sonarr: ArrStandIn, **more: Any) -> None:
    """A download of two episodes, which are two rows of the queue."""
    sonarr.keep("series", kept_series("Breaking Bad", 81189, 3))
    for episode in (12, 13):
        told = {"seriesId": 3, "episodeId": episode, "downloadId": "SABnzbd_nzo_pack"}
        sonarr.keep("queue", queued("Breaking.Bad.S01", episode, **told, **more))
        grabbed = {"eventType": "grabbed", "sourceTitle": "Breaking.Bad.S01", "date": LONG_AGO}
        sonarr.keep("history", {**grabbed, **told})


async def stuck(desk: Desk, sonarr: ArrStandIn, **policy: Any) -> Service:
    """Sonarr with a download that is not imported, after the looks that make it a case."""
    pack(sonarr, **BLOCKED)
    service = await desk.add("TV", "sonarr", sonarr.url, KEY)
    await desk.policy(**{"strikes": 2, "stuck_minutes": 0, **policy})
    assert (await desk.watch())["recover_job_id"] is None
    assert (await desk.watch())["recover_job_id"]
    return service


def deletions(sonarr: ArrStandIn) -> list[Asked]:
    return [asked for asked in sonarr.asked if asked.method == "DELETE"]


async def test_what_is_not_imported_is_replaced_and_recovers(desk: Desk, ear: Ear) -> None:
    async with arr_standing_in("sonarr", **HANDLING) as sonarr:
        await stuck(desk, sonarr)
        await desk.recover(dry_run=True)
        assert (deletions(sonarr), sonarr.commands) == ([], [])
        await desk.recover(dry_run=False)
        (deleted,) = deletions(sonarr)
        assert deleted.query == {"removeFromClient": "true", "blocklist": "true", "skipRedownload": "true"}
        assert [row["sourceTitle"] for row in sonarr.rows("blocklist")] == ["Breaking.Bad.S01"]
        assert sonarr.commands == [{"name": "EpisodeSearch", "episodeIds": [12, 13]}]
        said, done = await desk.recoveries()
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
            sonarr.keep("history", {**imported, **told, "series": {"id": 3, "title": series["title"], "tags": []}})
            await desk.watch()
        assert ear.of("content.added") == [
            {"request_id": None, "content_id": "3", "title": "Breaking Bad", "type": "series"}
        ]
        assert (await desk.recoveries())[-1].recovered_at is not None


@pytest.mark.parametrize(("for_people", "commands"), [(True, 0), (False, 1)])
async def test_who_searches_by_itself_is_not_told_to(desk: Desk, for_people: bool, commands: int) -> None:
    """Unless that leaves out what a person has chosen: nobody can tell whether this was."""
    options = {"id": 1, "autoRedownloadFailed": True, "autoRedownloadFailedFromInteractiveSearch": for_people}
    resources: dict[str, Any] = {"config/downloadclient": options}
    async with arr_standing_in("sonarr", **resources) as sonarr:
        await stuck(desk, sonarr)
        await desk.recover()
        (deleted,) = deletions(sonarr)
        assert (deleted.query["skipRedownload"], len(sonarr.commands)) == (str(not for_people).lower(), commands)
        assert [one.searched for one in await desk.recoveries()] == [True]


@pytest.mark.parametrize(
    ("tag", "policy", "decision"),
    [
        ("Keep", {"protected_tags": ["keep"]}, "leave"),
        ("", {"leave_messages": ['NO "FILES"']}, "leave"),
        ("", {"max_per_hour": 0}, "wait"),
    ],
)
async def test_what_the_policy_forbids_is_not_touched(
    desk: Desk, tag: str, policy: dict[str, Any], decision: str
) -> None:
    async with arr_standing_in("sonarr", **HANDLING) as sonarr:
        if tag:
            sonarr.keep("tag", {"id": 5, "label": tag})
        await stuck_with_tags(desk, sonarr, [5] if tag else [], policy)
        for _ in range(2):
            await desk.recover()
        assert (deletions(sonarr), sonarr.commands) == ([], [])
        assert await desk.decisions() == [(decision, "noted")]  # it is said once


async def stuck_with_tags(desk: Desk, sonarr: ArrStandIn, tags: list[int], policy: dict[str, Any]) -> None:
    series = kept_series("Breaking Bad", 81189, 3, tags=tags)
    shown = {"id": 3, "title": "Breaking Bad", "tags": tags}
    sonarr.keep("series", series)
    sonarr.keep("queue", queued("Breaking.Bad.S01", 12, seriesId=3, episodeId=12, series=shown, **BLOCKED))
    await desk.add("TV", "sonarr", sonarr.url, KEY)
    await desk.policy(strikes=1, stuck_minutes=0, **policy)
    await desk.watch()


async def test_an_hour_sees_no_more_than_its_cap(desk: Desk) -> None:
    async with arr_standing_in("radarr", **HANDLING) as radarr:
        for number in range(1, 5):
            radarr.keep("movie", kept_movie(f"Movie {number}", 600 + number, number))
            radarr.keep("queue", queued(f"Movie.{number}", number, movieId=number, **FAILED))
        await desk.add("Films", "radarr", radarr.url, KEY)
        await desk.policy(grace_minutes=0, max_per_hour=3)
        await desk.watch()
        for _ in range(3):
            await desk.recover()
        assert len(deletions(radarr)) == 3
        assert [command["movieIds"] for command in radarr.commands] == [[1], [2], [3]]
        assert await desk.decisions() == [*3 * [("replace", "done")], ("wait", "noted")]


async def test_a_failure_is_told_once_and_left_to_sonarr_for_a_while(desk: Desk, ear: Ear) -> None:
    async with arr_standing_in("sonarr", **HANDLING) as sonarr:
        pack(sonarr, **FAILED, errorMessage="Aborted")
        await desk.add("TV", "sonarr", sonarr.url, KEY)
        await desk.policy()
        for _ in range(2):
            await desk.watch()
            await desk.recover()
        assert ear.of("download.failed") == [
            {"download_id": "SABnzbd_nzo_pack", "title": "Breaking.Bad.S01", "reason": "Aborted"}
        ]
        assert (await desk.decisions(), deletions(sonarr)) == ([("wait", "noted")], [])


async def test_what_comes_from_usenet_waits_and_a_torrent_can_be_stuck(desk: Desk) -> None:
    async with arr_standing_in("sonarr", **HANDLING) as sonarr:
        sonarr.keep("queue", queued("Usenet", 1, seriesId=3, episodeId=1))
        sonarr.keep("queue", queued("Torrent", 2, seriesId=3, episodeId=2, protocol="torrent", status="warning"))
        sonarr.keep("queue", queued("Moving", 3, seriesId=3, episodeId=3, protocol="torrent"))
        await desk.add("TV", "sonarr", sonarr.url, KEY)
        await desk.policy(strikes=2, stuck_minutes=0)
        for looks in range(4):
            sonarr.rows("queue")[2]["sizeleft"] = 1e9 - looks
            await desk.watch()
        rows = {row.title: row for row in (await desk.downloads()).values()}
        assert {title: (row.state, row.strikes) for title, row in rows.items()} == {
            "Usenet": ("waiting", 0),
            "Torrent": ("running", 3),
            "Moving": ("running", 0),
        }
        await desk.recover()
        assert [one.title for one in await desk.recoveries()] == ["Torrent"]


async def test_where_nothing_moves_at_all_no_torrent_is_to_blame(desk: Desk) -> None:
    async with arr_standing_in("sonarr", **HANDLING) as sonarr:
        for number in (1, 2):
            told = {"seriesId": 3, "episodeId": number, "protocol": "torrent", "status": "warning"}
            sonarr.keep("queue", queued(f"Torrent {number}", number, **told))
        await desk.add("TV", "sonarr", sonarr.url, KEY)
        await desk.policy(strikes=1, stuck_minutes=0)
        for _ in range(3):
            await desk.watch()
        assert {row.strikes for row in (await desk.downloads()).values()} == {0}
        sonarr.rows("queue").pop()
        for _ in range(2):
            await desk.watch()
        assert [row.strikes for row in (await desk.downloads()).values()] == [2]


async def test_what_has_got_on_meanwhile_is_kept(desk: Desk) -> None:
    def before(asked: Asked) -> Reply | None:
        return telling({"message": "Not now"}, 503) if asked.method == "DELETE" else None

    async with arr_standing_in("sonarr", before, **HANDLING) as sonarr:
        sonarr.keep("queue", queued("Torrent", 1, seriesId=3, episodeId=1, protocol="torrent", status="warning"))
        await desk.add("TV", "sonarr", sonarr.url, KEY)
        await desk.policy(strikes=1, stuck_minutes=0)
        for _ in range(2):
            await desk.watch()
        await desk.recover()
        (one,) = await desk.recoveries()
        assert (one.decision, one.outcome, len(deletions(sonarr))) == ("replace", "begun", 1)
        sonarr.rows("queue")[0]["sizeleft"] = 5e8
        await desk.resume()
        assert (await desk.decisions(), len(deletions(sonarr))) == ([("replace", "overtaken")], 1)


@pytest.mark.parametrize("acted", [False, True])
async def test_a_worker_that_dies_repeats_nothing(desk: Desk, acted: bool) -> None:
    """It is killed when it has asked for a removal, which Sonarr has not done yet, or has."""
    reached, dying = asyncio.Event(), True
    served: list[ArrStandIn] = []

    def before(asked: Asked) -> Reply | None:
        if asked.method != "DELETE" or not dying:
            return None
        if acted:
            served[0](asked)
        reached.set()
        return Reply(never=True)

    async with arr_standing_in("sonarr", before, **HANDLING) as sonarr:
        served.append(sonarr)
        await stuck(desk, sonarr)
        worker = await asyncio.create_subprocess_exec(sys.executable, "-c", RECOVER, env=os.environ)
        await reached.wait()
        worker.kill()
        await worker.wait()
        assert await desk.decisions() == [("replace", "begun")]
        dying = False
        await desk.recover()
        assert await desk.decisions() == [("replace", "done")]
        assert len(deletions(sonarr)) == (1 if acted else 2)
        assert len(sonarr.rows("blocklist")) == 1
        assert len(sonarr.commands) == 1
        await desk.recover()
        assert (len(sonarr.commands), len(await desk.recoveries())) == (1, 1)


@pytest.mark.parametrize("moved", [False, True])
async def test_what_was_not_removed_by_us_is_not_searched_for(desk: Desk, moved: bool) -> None:
    """A person removes it before we have begun, or the service at this address is another one by then."""
    away = True

    def before(asked: Asked) -> Reply | None:
        return telling({"message": "Not now"}, 503) if away and asked.path.endswith("/config/downloadclient") else None

    async with (
        arr_standing_in("sonarr", before, **HANDLING) as sonarr,
        arr_standing_in("sonarr", **HANDLING) as another,
    ):
        service = await stuck(desk, sonarr)
        await desk.recover()
        assert await desk.decisions() == [("replace", "begun")]
        if moved:
            pack(another, **BLOCKED)
            async with desk.database.transaction() as session:
                moved_one = await service_store.get(session, service.id)
                await service_store.change(session, moved_one, {"url": another.url, "api_key": KEY})
        sonarr.rows("queue").clear()
        away = False
        await desk.resume()
        assert await desk.decisions() == [("replace", "overtaken")]
        assert [*sonarr.commands, *another.commands, *deletions(sonarr), *deletions(another)] == []


@pytest.mark.parametrize("looks", [1, 2])
async def test_what_goes_by_itself_just_before_it_is_removed_is_not_searched_for(desk: Desk, looks: int) -> None:
    """It is seen when it is looked at, or even when it is about to be asked for."""
    left = 0

    def before(asked: Asked) -> Reply | None:
        nonlocal left
        if not left or asked.method != "GET" or not asked.path.endswith("/queue"):
            return None
        told, left = sonarr(asked), left - 1
        if not left:
            sonarr.rows("queue").clear()
        return told

    async with arr_standing_in("sonarr", before, **HANDLING) as sonarr:
        await stuck(desk, sonarr)
        left = looks
        await desk.recover()
        assert (len(deletions(sonarr)), await desk.decisions()) == (looks - 1, [("replace", "overtaken")])
        assert sonarr.commands == []


async def test_what_was_begun_ends_when_the_policy_does_not_act_any_more(desk: Desk) -> None:
    def before(asked: Asked) -> Reply | None:
        return telling({"message": "Not now"}, 503) if asked.method == "DELETE" else None

    async with arr_standing_in("sonarr", before, **HANDLING) as sonarr:
        await stuck(desk, sonarr)
        await desk.recover()
        await desk.policy(dry_run=True, strikes=100)
        await desk.resume()
        (one,) = await desk.recoveries()
        assert (one.outcome, one.error) == ("overtaken", "The policy has changed, and does not act any more.")
        assert (await desk.watch())["recover_job_id"] is None


async def test_what_a_person_wished_goes_on_whatever_the_policy_says(desk: Desk) -> None:
    away = True

    def before(asked: Asked) -> Reply | None:
        return telling({"message": "Not now"}, 503) if away and asked.method == "DELETE" else None

    async with arr_standing_in("sonarr", before, **HANDLING) as sonarr:
        await stuck(desk, sonarr, dry_run=True)
        await desk.recover(dry_run=False)
        assert await desk.decisions() == [("replace", "begun")]
        away = False
        await desk.resume()
        assert (len(deletions(sonarr)), len(sonarr.commands)) == (2, 1)


async def test_a_tag_protects_what_is_about_to_be_removed(desk: Desk) -> None:
    async with arr_standing_in("sonarr", **HANDLING) as sonarr:
        await stuck(desk, sonarr, protected_tags=["keep"])
        sonarr.keep("tag", {"id": 5, "label": "Keep"})
        for row in sonarr.rows("queue"):
            row["series"] = {"id": 3, "title": "Breaking Bad", "tags": [5]}
        await desk.recover()
        (one,) = await desk.recoveries()
        assert (one.outcome, one.error, deletions(sonarr)) == ("overtaken", "protected by 'keep'", [])


async def test_what_was_begun_is_not_decided_again(desk: Desk) -> None:
    def before(asked: Asked) -> Reply | None:
        return telling({"message": "Not now"}, 503) if asked.method == "DELETE" else None

    async with arr_standing_in("sonarr", before, **HANDLING) as sonarr:
        await stuck(desk, sonarr)
        for _ in range(3):
            await desk.recover(dry_run=False)
        assert await desk.decisions() == [("replace", "begun"), ("wait", "noted")]


async def test_a_policy_that_changes_stops_what_has_not_begun(desk: Desk) -> None:
    """An administrator sees a wrong removal, and says that nothing is to be done."""
    room = ThreadPoolExecutor(1)

    def before(asked: Asked) -> Reply | None:
        if asked.method == "DELETE":
            room.submit(asyncio.run, with_own_database(stop)).result()
        return None

    async def stop(database: Database) -> None:
        await Desk(database).policy(dry_run=True)

    async with arr_standing_in("radarr", before, **HANDLING) as radarr:
        for number in (1, 2):
            radarr.keep("movie", kept_movie(f"Movie {number}", 600 + number, number))
            radarr.keep("queue", queued(f"Movie.{number}", number, movieId=number, **FAILED))
        await desk.add("Films", "radarr", radarr.url, KEY)
        await desk.policy(grace_minutes=0)
        await desk.watch()
        await desk.recover()
        assert (len(deletions(radarr)), await desk.decisions()) == (
            1,
            [("replace", "done"), ("replace", "overtaken")],
        )


async def test_a_failure_that_was_out_of_sight_is_dealt_with(desk: Desk) -> None:
    """Sonarr has forgotten its queue, such as when it has just started."""
    async with arr_standing_in("sonarr", **HANDLING) as sonarr:
        pack(sonarr, **FAILED)
        await desk.add("TV", "sonarr", sonarr.url, KEY)
        await desk.policy(grace_minutes=0)
        await desk.watch()
        rows = list(sonarr.rows("queue"))
        sonarr.rows("queue").clear()
        await desk.watch()
        sonarr.rows("queue").extend(rows)
        await desk.watch()
        await desk.recover()
        assert (len(deletions(sonarr)), await desk.decisions()) == (1, [("replace", "done")])


async def test_a_service_that_goes_away_is_asked_again_later(desk: Desk) -> None:
    away = True

    def before(asked: Asked) -> Reply | None:
        return telling({"message": "Not now"}, 503) if away and asked.method == "DELETE" else None

    async with arr_standing_in("sonarr", before, **HANDLING) as sonarr:
        await stuck(desk, sonarr)
        await desk.recover()
        (one,) = await desk.recoveries()
        assert (one.outcome, one.again_at is not None) == ("begun", True)
        assert "not there right now" in (one.error or "")
        away = False
        await desk.recover()
        assert await desk.decisions() == [("replace", "begun")]  # not at once
        await desk.resume()
        assert [(*told, len(sonarr.commands)) for told in await desk.decisions()] == [("replace", "done", 1)]


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
async def test_an_answer_that_makes_no_sense_is_said_to_be_one(desk: Desk, path: str, answer: Any) -> None:
    def handle(asked: Asked) -> Reply:
        end = asked.path.removeprefix("/api/v3/")
        if end == path:
            return telling(answer)
        return telling({"records": []} if end == "queue" else [])

    async with standing_in(handle) as server:
        service = await desk.add("TV", "sonarr", server.url, KEY)
        following = service.connector.download_tracker
        assert following
        with pytest.raises(BadResponse, match="TV answers with something unexpected"):
            async with service_store.open_client(desk.database, service) as client:
                await following.poll(client, TrackingPosition(service.connected_as_of, now()))
        told = await desk.watch()
        assert (told["looked_at"], list(told["unseen"])) == (0, ["TV"])


async def test_one_service_that_is_down_hides_no_other(desk: Desk) -> None:
    async with standing_in(lambda asked: page("Welcome")) as other, arr_standing_in("radarr", **HANDLING) as radarr:
        await desk.add("TV", "sonarr", other.url, KEY)
        await desk.add("Films", "radarr", radarr.url, KEY)
        told = await desk.watch()
        assert (told["looked_at"], list(told["unseen"])) == (1, ["TV"])
