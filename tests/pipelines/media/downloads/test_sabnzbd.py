"""Tracking and recovery of the downloads of a real SABnzbd, with a news server that the tests control."""

import asyncio
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.settings import get_settings
from tests.pipelines.media.downloads.download_jobs import DownloadJobs, RecordedEvents
from tests.support.services import real_services
from tests.support.services.fake_arr import fake_arr, library_series, queue_row
from tests.support.services.fake_services import KEY
from tests.support.services.news_server import (
    NewsServer,
    add_download,
    add_news_server,
    call_api,
    finished_download,
    running_news_server,
    wait_until_stalled,
)
from tests.support.services.real_services import RunningService
from tests.support.services.stub_server import StubRequest, StubResponse, json_response, stub_server
from tests.support.waiting import eventually

pytestmark = [pytest.mark.usefixtures("published"), pytest.mark.parametrize("database", ["sqlite"], indirect=True)]

SIZE = 40_000
TITLE = "Le Père 🎬 'Noël'"


@pytest.fixture(scope="module")
def news() -> Iterator[NewsServer]:
    with running_news_server() as news:
        yield news


@pytest.fixture(scope="module")
def server(news: NewsServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with real_services.sabnzbd(tmp_path_factory.mktemp("sabnzbd")) as server:
        add_news_server(server, news)
        yield server


@pytest.fixture
def sabnzbd(server: RunningService) -> RunningService:
    """A SABnzbd without a history: a download that finished in the same second would count otherwise."""
    call_api(server, "history", name="delete", value="all")
    return server


def add_failed_download(sabnzbd: RunningService, news: NewsServer, name: str) -> str:
    """Add a download whose articles are all lost, and wait until it has failed."""
    nzo_id = add_download(sabnzbd, news.post("a.bin", secrets.token_bytes(SIZE), lost=4), name)
    assert finished_download(sabnzbd, nzo_id)["status"] == "Failed"
    return nzo_id


@pytest.mark.deep
async def test_finished_downloads_are_counted_and_a_failure_is_published_once(
    sabnzbd: RunningService, news: NewsServer, jobs: DownloadJobs, published: RecordedEvents
) -> None:
    before = add_failed_download(sabnzbd, news, "Before its time")
    await asyncio.sleep(1)  # SABnzbd has times in whole seconds
    await jobs.add("Usenet", "sabnzbd", sabnzbd.url, sabnzbd.key)
    assert (await jobs.watch())["failed"] == 0
    good = add_download(sabnzbd, news.post("b.bin", secrets.token_bytes(SIZE)), "Good")
    assert finished_download(sabnzbd, good)["status"] == "Completed"
    bad = add_failed_download(sabnzbd, news, TITLE)
    # Two polls at the same time, and one after them.
    both = await asyncio.gather(jobs.watch(), jobs.watch())
    later = await jobs.watch()
    assert [sum(result["failed"] for result in both), later["failed"]] == [1, 0]
    (event,) = published.of("download.failed")
    assert (event["download_id"], event["title"]) == (bad, TITLE)
    # Only the host of a URL is stored, because the rest of it may contain a key.
    assert event["reason"] == re.sub(r"(https?://[^/]+)/\S+", r"\1/…", finished_download(sabnzbd, bad)["fail_message"])
    state = await jobs.service_state()
    assert (state.completed, state.failed, state.underway) == (1, 1, 0)
    assert before not in await jobs.downloads()


@pytest.mark.deep
async def test_a_failure_is_given_up_after_its_retries(
    sabnzbd: RunningService, news: NewsServer, jobs: DownloadJobs
) -> None:
    await jobs.add("Usenet", "sabnzbd", sabnzbd.url, sabnzbd.key)
    await jobs.policy(max_retries=1)
    first = add_failed_download(sabnzbd, news, "Gone for good")
    assert (await jobs.watch())["recover_job_id"]
    await jobs.recover(dry_run=True)
    assert finished_download(sabnzbd, first)["status"] == "Failed"
    await jobs.recover()
    planned, retried = await jobs.recoveries_of("Gone for good")
    assert [(recovery.decision, recovery.outcome) for recovery in (planned, retried)] == [
        ("retry", "dry_run"),
        ("retry", "done"),
    ]
    assert call_api(sabnzbd, "history", nzo_ids=first)["history"]["slots"] == []
    assert retried.new_item
    assert finished_download(sabnzbd, retried.new_item)["status"] == "Failed"
    await jobs.watch()
    await jobs.recover()
    *_, last = await jobs.recoveries_of("Gone for good")
    assert (last.decision, last.outcome, last.item) == ("give_up", "noted", retried.new_item)
    assert "after 1 retries" in last.reason
    assert (await jobs.watch())["recover_job_id"] is None  # no decision is left
    metrics = jobs.link.metrics
    assert (metrics["retried"], metrics["given_up"], metrics["recovered"], metrics["failed"]) == (1, 1, 0, 0)


@pytest.mark.deep
async def test_a_download_removed_by_a_person_is_overtaken(
    sabnzbd: RunningService, news: NewsServer, jobs: DownloadJobs
) -> None:
    await jobs.add("Usenet", "sabnzbd", sabnzbd.url, sabnzbd.key)
    await jobs.policy(max_retries=5)
    item = add_failed_download(sabnzbd, news, "Dealt with")
    await jobs.watch()
    call_api(sabnzbd, "history", name="delete", value=item)
    await jobs.recover()
    assert [(recovery.decision, recovery.outcome) for recovery in await jobs.recoveries_of("Dealt with")] == [
        ("retry", "overtaken")
    ]
    assert (await jobs.watch())["recover_job_id"] is None


async def test_a_retry_that_completes_counts_as_recovered(
    sabnzbd: RunningService, news: NewsServer, jobs: DownloadJobs
) -> None:
    await jobs.add("Usenet", "sabnzbd", sabnzbd.url, sabnzbd.key)
    await jobs.policy()
    nzb = news.post("c.bin", secrets.token_bytes(SIZE))
    articles = dict(news.articles)
    news.articles.clear()
    item = add_download(sabnzbd, nzb, "Late")
    assert finished_download(sabnzbd, item)["status"] == "Failed"
    await jobs.watch()
    news.articles |= articles
    await jobs.recover()
    (retried,) = await jobs.recoveries_of("Late")
    assert finished_download(sabnzbd, retried.new_item or "")["status"] == "Completed"
    result = await jobs.watch()
    assert (result["recovered"], bool(result["recover_job_id"])) == (1, True)
    (recovered,) = await jobs.recoveries_of("Late")
    assert recovered.recovered_at is not None
    await jobs.recover()
    assert jobs.link.metrics["recovered"] == 1


@pytest.mark.deep
async def test_a_download_that_waits_in_the_queue_is_not_stuck(
    sabnzbd: RunningService, news: NewsServer, jobs: DownloadJobs
) -> None:
    await jobs.add("Usenet", "sabnzbd", sabnzbd.url, sabnzbd.key)
    await jobs.policy(strikes=1, stuck_minutes=0)
    with news.paused():
        items = [
            add_download(sabnzbd, news.post(f"{n}.bin", secrets.token_bytes(SIZE)), f"Waits {n}") for n in range(2)
        ]
        wait_until_stalled(sabnzbd, news)
        for _ in range(3):
            await jobs.watch()
        rows = await jobs.downloads()
        assert [(rows[item].state, rows[item].strikes) for item in items] == [("running", 0), ("waiting", 0)]
        call_api(sabnzbd, "pause")
        eventually(lambda: call_api(sabnzbd, "queue")["queue"]["status"] == "Paused")
        await jobs.watch()
        rows = await jobs.downloads()
        assert {rows[item].state for item in items} == {"waiting"}
        await jobs.recover()
        assert [await jobs.recoveries_of(f"Waits {number}") for number in range(2)] == [[], []]
    call_api(sabnzbd, "resume")
    assert {finished_download(sabnzbd, item)["status"] for item in items} == {"Completed"}


async def test_the_key_in_a_url_is_not_stored(sabnzbd: RunningService, jobs: DownloadJobs) -> None:
    key = secrets.token_hex(16)
    await jobs.add("Usenet", "sabnzbd", sabnzbd.url, sabnzbd.key)
    # Until SABnzbd has fetched it, the name of a download is its URL.
    (item,) = call_api(sabnzbd, "addurl", name=f"http://127.0.0.1:9/getnzb?id=1&apikey={key}")["nzo_ids"]
    assert key in str(call_api(sabnzbd, "queue", nzo_ids=item))
    await jobs.watch()
    row = (await jobs.downloads())[item]
    assert "http://127.0.0.1:9/…" in row.title
    assert key not in row.title
    call_api(sabnzbd, "queue", name="delete", value=item)


@pytest.mark.deep
async def test_a_failure_is_marked_at_the_service_that_chose_the_download(
    sabnzbd: RunningService, news: NewsServer, jobs: DownloadJobs
) -> None:
    item = add_failed_download(sabnzbd, news, "Breaking.Bad.S01E02")
    columns = {"seriesId": 3, "episodeId": 12, "sourceTitle": "Breaking.Bad.S01E02", "date": "2025-01-08T10:30:00Z"}
    resources: dict[str, Any] = {"config/downloadclient": {"id": 1, "autoRedownloadFailed": False}}
    async with fake_arr("sonarr", **resources) as sonarr:
        sonarr.add_row("series", library_series("Breaking Bad", 81189, 3))
        sonarr.add_row("history", {**columns, "id": 7, "eventType": "grabbed", "downloadId": item})
        tv = await jobs.add("TV", "sonarr", sonarr.url, KEY)
        usenet = await jobs.add("Usenet", "sabnzbd", sabnzbd.url, sabnzbd.key)
        async with jobs.database.transaction() as session:
            usenet.connected_as_of = usenet.connected_as_of.replace(year=2025)
            await session.merge(usenet)
        await jobs.policy(grace_minutes=1000)
        await jobs.watch()
        await jobs.recover()
        recoveries = [recovery for recovery in await jobs.recoveries() if recovery.item == item]
        assert [(recovery.decision, recovery.service_id, recovery.outcome) for recovery in recoveries] == [
            ("wait", tv.id, "noted")
        ]
        await jobs.policy(grace_minutes=0, max_retries=0)
        await jobs.recover()
        marked = [recovery for recovery in await jobs.recoveries() if recovery.decision == "mark_failed"]
        assert [(recovery.item, recovery.outcome, recovery.searched, recovery.content) for recovery in marked] == [
            (item, "done", True, ["series:3", "episode:12"])
        ]
        assert [request.path for request in sonarr.requests if request.method == "POST"] == [
            "/api/v3/history/failed/7",
            "/api/v3/command",
        ]
        assert sonarr.commands == [{"name": "EpisodeSearch", "episodeIds": [12]}]


async def test_unknown_folders_are_reported_and_removed_only_by_policy(
    sabnzbd: RunningService, jobs: DownloadJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = sabnzbd.folder / "complete"
    old, new = complete / "_FAILED_Old", complete / "_FAILED_New"
    for folder in (old, new, complete / "Good"):
        folder.mkdir(parents=True, exist_ok=True)
    os.utime(old, (0, 0))
    await jobs.add("Usenet", "sabnzbd", sabnzbd.url, sabnzbd.key)
    await jobs.policy(max_retries=0)
    for _ in range(2):
        await jobs.recover()
    reported = [recovery.title for recovery in await jobs.recoveries() if recovery.decision == "report"]
    assert sorted(reported) == ["_FAILED_New", "_FAILED_Old"]  # each once, and no known folder
    await jobs.policy(max_retries=0, leftovers="remove")
    await jobs.recover()
    assert old.exists()  # the folder is not mapped yet
    monkeypatch.setenv("FORGEARR_MEDIA__FOLDERS", f"{{{complete}: {complete}}}")
    get_settings.cache_clear()
    await jobs.recover()
    assert [old.exists(), new.exists()] == [False, True]
    removed = [recovery for recovery in await jobs.recoveries() if recovery.decision == "remove_folder"]
    assert [(recovery.item, recovery.outcome) for recovery in removed] == [(str(old), "done")]


# Responses that the real SABnzbd does not give here


def respond_with(
    queue: list[Any], history: list[Any], folder: str = "/data/complete", speed: str = "0.00"
) -> Callable[[StubRequest], StubResponse]:
    """A handler that responds like a SABnzbd with these downloads and no category."""
    bodies: dict[str, Any] = {
        "queue": {"queue": {"slots": queue, "status": "Idle", "kbpersec": speed}},
        "history": {"history": {"slots": history, "last_history_update": 1}},
        "fullstatus": {"status": {"completedir": folder}},
        "get_config": {"config": {}},
    }
    return lambda request: json_response(bodies[request.query["mode"]])


async def test_a_download_that_is_still_being_moved_is_not_finished(
    jobs: DownloadJobs, published: RecordedEvents
) -> None:
    """SABnzbd 4 and 5 report it as completed before that."""
    slot = {"nzo_id": "1", "name": "Film", "status": "Completed", "completed": int(time.time()) + 3600, "loaded": True}
    async with stub_server(respond_with([], [slot])) as server:
        await jobs.add("Usenet", "sabnzbd", server.url, KEY)
        await jobs.watch()
        row = (await jobs.downloads())["1"]
        assert (row.state, row.ended_at) == ("processing", None)
        slot["loaded"] = False
        await jobs.watch()
        assert (await jobs.downloads())["1"].ended_at is not None


async def test_a_download_in_both_queue_and_history_is_published_once(
    jobs: DownloadJobs, published: RecordedEvents
) -> None:
    queue = [{"nzo_id": "1", "filename": "Film", "status": "Downloading", "mbleft": "0.50"}]
    failed = {"nzo_id": "1", "name": "Film", "status": "Failed", "completed": int(time.time()) + 3600}
    async with stub_server(respond_with(queue, [failed])) as server:
        await jobs.add("Usenet", "sabnzbd", server.url, KEY)
        first = await jobs.watch()
        assert (first["failed"], (await jobs.downloads())["1"].state) == (1, "failed")
        assert (await jobs.service_state()).underway == 0
        queue.clear()
        assert (await jobs.watch())["failed"] == 0
    assert (len(published.of("download.failed")), (await jobs.service_state()).failed) == (1, 1)


async def test_an_id_that_cannot_be_stored_does_not_hide_other_services(
    sabnzbd: RunningService, jobs: DownloadJobs
) -> None:
    async with stub_server(respond_with([{"nzo_id": "x" * 301, "status": "Queued"}], [])) as server:
        await jobs.add("Odd", "sabnzbd", server.url, KEY)
        await jobs.add("Usenet", "sabnzbd", sabnzbd.url, sabnzbd.key)
        result = await jobs.watch()
        assert (result["looked_at"], list(result["unseen"])) == (1, ["Odd"])


async def test_a_stalled_download_is_replaced_by_the_service_that_chose_it(jobs: DownloadJobs) -> None:
    slot = {"nzo_id": "SABnzbd_nzo_1", "filename": "Still", "status": "Downloading", "mbleft": "953.67"}
    resources: dict[str, Any] = {"config/downloadclient": {"id": 1, "autoRedownloadFailed": False}}
    async with (
        stub_server(respond_with([slot], [], speed="512.00")) as server,
        fake_arr("sonarr", **resources) as sonarr,
    ):
        sonarr.add_row("series", library_series("Breaking Bad", 81189, 3))
        sonarr.add_row("queue", queue_row("Still", 1, seriesId=3, episodeId=12))
        tv = await jobs.add("TV", "sonarr", sonarr.url, KEY)
        await jobs.add("Usenet", "sabnzbd", server.url, KEY)
        await jobs.policy(strikes=2, stuck_minutes=0)
        for _ in range(3):
            await jobs.watch()
        await jobs.recover()
        (recovery,) = await jobs.recoveries()
        assert (recovery.service_id, recovery.decision, recovery.outcome, recovery.searched) == (
            tv.id,
            "replace",
            "done",
            True,
        )
        assert (sonarr.rows("queue"), sonarr.commands) == ([], [{"name": "EpisodeSearch", "episodeIds": [12]}])


async def test_no_recovery_is_queued_for_the_folders_of_an_unavailable_service(jobs: DownloadJobs) -> None:
    await jobs.policy()
    service = await jobs.add("Away", "sabnzbd", "http://127.0.0.1:9", KEY)
    assert (await jobs.watch())["recover_job_id"] is None
    async with stub_server(respond_with([], [])) as server:
        async with jobs.database.transaction() as session:
            service.url = server.url
            await session.merge(service)
        assert (await jobs.watch())["recover_job_id"]


async def test_a_begun_removal_of_a_folder_stops_if_the_policy_only_reports(
    jobs: DownloadJobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete, polls = tmp_path / "complete", 0
    old = complete / "_FAILED_Old"
    old.mkdir(parents=True)
    os.utime(old, (0, 0))
    monkeypatch.setenv("FORGEARR_MEDIA__FOLDERS", f"{{{complete}: {complete}}}")
    get_settings.cache_clear()
    respond = respond_with([], [], folder=str(complete))

    def handle(request: StubRequest) -> StubResponse:
        """Fail just when the folder is to be removed."""
        nonlocal polls
        polls += request.query["mode"] == "fullstatus"
        return json_response({}, 503) if polls == 2 else respond(request)

    async with stub_server(handle) as server:
        await jobs.add("Usenet", "sabnzbd", server.url, KEY)
        await jobs.policy(leftovers="remove")
        await jobs.recover()
        assert await jobs.decisions() == [("remove_folder", "begun")]
        await jobs.policy(leftovers="report")
        await jobs.resume()
        assert (await jobs.decisions(), old.exists()) == ([("remove_folder", "overtaken"), ("report", "noted")], True)


async def test_a_folder_that_cannot_be_read_does_not_fail_the_job(jobs: DownloadJobs) -> None:
    async with stub_server(respond_with([], [], folder=f"/{'x' * 300}")) as server:
        await jobs.add("Usenet", "sabnzbd", server.url, KEY)
        await jobs.watch()
        await jobs.policy()
        await jobs.recover()
        assert (await jobs.service_state()).leftovers_at is not None
