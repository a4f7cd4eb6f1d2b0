"""Following and mending the downloads of a real SABnzbd, which a news server of the tests serves, or fails."""

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
from tests.pipelines.media.downloads.conftest import Desk, Ear
from tests.support.services import real_services
from tests.support.services.fake_arr import arr_standing_in, kept_series, queued
from tests.support.services.fake_services import KEY
from tests.support.services.news_server import Usenet, ask, download, ended, still, subscribe, usenet
from tests.support.services.real_services import Running
from tests.support.services.stub_server import Asked, Reply, standing_in, telling
from tests.support.waiting import eventually

pytestmark = [pytest.mark.usefixtures("ear"), pytest.mark.parametrize("database", ["sqlite"], indirect=True)]

SIZE = 40_000
TITLE = "Le Père 🎬 'Noël'"


@pytest.fixture(scope="module")
def news() -> Iterator[Usenet]:
    with usenet() as news:
        yield news


@pytest.fixture(scope="module")
def server(news: Usenet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with real_services.sabnzbd(tmp_path_factory.mktemp("sabnzbd")) as server:
        subscribe(server, news)
        yield server


@pytest.fixture
def sabnzbd(server: Running) -> Running:
    """Without a history: what has ended in this very second would count."""
    ask(server, "history", name="delete", value="all")
    return server


def failing(sabnzbd: Running, news: Usenet, name: str) -> str:
    """A download all of whose articles are lost, which has failed."""
    nzo_id = download(sabnzbd, news.post("a.bin", secrets.token_bytes(SIZE), lost=4), name)
    assert ended(sabnzbd, nzo_id)["status"] == "Failed"
    return nzo_id


@pytest.mark.deep
async def test_what_ends_is_counted_and_a_failure_is_told_once(
    sabnzbd: Running, news: Usenet, desk: Desk, ear: Ear
) -> None:
    before = failing(sabnzbd, news, "Before its time")
    await asyncio.sleep(1)  # SABnzbd tells whole seconds
    await desk.add("Usenet", "sabnzbd", sabnzbd.url, sabnzbd.key)
    assert (await desk.watch())["failed"] == 0
    good = download(sabnzbd, news.post("b.bin", secrets.token_bytes(SIZE)), "Good")
    assert ended(sabnzbd, good)["status"] == "Completed"
    bad = failing(sabnzbd, news, TITLE)
    # Two that look at the same time, and one that looks again.
    both = await asyncio.gather(desk.watch(), desk.watch())
    again = await desk.watch()
    assert [sum(one["failed"] for one in both), again["failed"]] == [1, 0]
    (told,) = ear.of("download.failed")
    assert (told["download_id"], told["title"]) == (bad, TITLE)
    # Of an address only the host is kept: elsewhere in it may be a key.
    assert told["reason"] == re.sub(r"(https?://[^/]+)/\S+", r"\1/…", ended(sabnzbd, bad)["fail_message"])
    followed = await desk.followed()
    assert (followed.completed, followed.failed, followed.underway) == (1, 1, 0)
    assert before not in await desk.downloads()


@pytest.mark.deep
async def test_a_failure_is_retried_and_given_up_in_the_end(sabnzbd: Running, news: Usenet, desk: Desk) -> None:
    await desk.add("Usenet", "sabnzbd", sabnzbd.url, sabnzbd.key)
    await desk.policy(max_retries=1)
    first = failing(sabnzbd, news, "Gone for good")
    assert (await desk.watch())["recover_job_id"]
    await desk.recover(dry_run=True)
    assert ended(sabnzbd, first)["status"] == "Failed"
    await desk.recover()
    said, retried = await desk.about("Gone for good")
    assert [(one.decision, one.outcome) for one in (said, retried)] == [("retry", "dry_run"), ("retry", "done")]
    assert ask(sabnzbd, "history", nzo_ids=first)["history"]["slots"] == []
    assert retried.new_item
    assert ended(sabnzbd, retried.new_item)["status"] == "Failed"
    await desk.watch()
    await desk.recover()
    *_, last = await desk.about("Gone for good")
    assert (last.decision, last.outcome, last.item) == ("give_up", "noted", retried.new_item)
    assert "after 1 retries" in last.reason
    assert (await desk.watch())["recover_job_id"] is None  # there is nothing more to decide
    metrics = desk.words.metrics
    assert (metrics["retried"], metrics["given_up"], metrics["recovered"], metrics["failed"]) == (1, 1, 0, 0)


@pytest.mark.deep
async def test_what_a_person_has_dealt_with_is_tried_once(sabnzbd: Running, news: Usenet, desk: Desk) -> None:
    await desk.add("Usenet", "sabnzbd", sabnzbd.url, sabnzbd.key)
    await desk.policy(max_retries=5)
    item = failing(sabnzbd, news, "Dealt with")
    await desk.watch()
    ask(sabnzbd, "history", name="delete", value=item)
    await desk.recover()
    assert [(one.decision, one.outcome) for one in await desk.about("Dealt with")] == [("retry", "overtaken")]
    assert (await desk.watch())["recover_job_id"] is None


async def test_what_comes_after_all_has_recovered(sabnzbd: Running, news: Usenet, desk: Desk) -> None:
    await desk.add("Usenet", "sabnzbd", sabnzbd.url, sabnzbd.key)
    await desk.policy()
    nzb = news.post("c.bin", secrets.token_bytes(SIZE))
    lost = dict(news.articles)
    news.articles.clear()
    item = download(sabnzbd, nzb, "Late")
    assert ended(sabnzbd, item)["status"] == "Failed"
    await desk.watch()
    news.articles |= lost
    await desk.recover()
    (retried,) = await desk.about("Late")
    assert ended(sabnzbd, retried.new_item or "")["status"] == "Completed"
    watched = await desk.watch()
    assert (watched["recovered"], bool(watched["recover_job_id"])) == (1, True)
    (recovered,) = await desk.about("Late")
    assert recovered.recovered_at is not None
    await desk.recover()
    assert desk.words.metrics["recovered"] == 1


@pytest.mark.deep
async def test_who_waits_in_the_queue_is_not_stuck(sabnzbd: Running, news: Usenet, desk: Desk) -> None:
    await desk.add("Usenet", "sabnzbd", sabnzbd.url, sabnzbd.key)
    await desk.policy(strikes=1, stuck_minutes=0)
    with news.holding():
        items = [download(sabnzbd, news.post(f"{n}.bin", secrets.token_bytes(SIZE)), f"Waits {n}") for n in range(2)]
        still(sabnzbd, news)
        for _ in range(3):
            await desk.watch()
        rows = await desk.downloads()
        assert [(rows[item].state, rows[item].strikes) for item in items] == [("running", 0), ("waiting", 0)]
        ask(sabnzbd, "pause")
        eventually(lambda: ask(sabnzbd, "queue")["queue"]["status"] == "Paused")
        await desk.watch()
        rows = await desk.downloads()
        assert {rows[item].state for item in items} == {"waiting"}
        await desk.recover()
        assert [await desk.about(f"Waits {number}") for number in range(2)] == [[], []]
    ask(sabnzbd, "resume")
    assert {ended(sabnzbd, item)["status"] for item in items} == {"Completed"}


async def test_the_key_in_an_address_is_kept_nowhere(sabnzbd: Running, desk: Desk) -> None:
    key = secrets.token_hex(16)
    await desk.add("Usenet", "sabnzbd", sabnzbd.url, sabnzbd.key)
    # Until SABnzbd has it, a download is called by the address that it is fetched from.
    (item,) = ask(sabnzbd, "addurl", name=f"http://127.0.0.1:9/getnzb?id=1&apikey={key}")["nzo_ids"]
    assert key in str(ask(sabnzbd, "queue", nzo_ids=item))
    await desk.watch()
    row = (await desk.downloads())[item]
    assert "http://127.0.0.1:9/…" in row.title
    assert key not in row.title
    ask(sabnzbd, "queue", name="delete", value=item)


@pytest.mark.deep
async def test_who_chose_a_download_hears_that_it_has_failed(sabnzbd: Running, news: Usenet, desk: Desk) -> None:
    item = failing(sabnzbd, news, "Breaking.Bad.S01E02")
    found = {"seriesId": 3, "episodeId": 12, "sourceTitle": "Breaking.Bad.S01E02", "date": "2025-01-08T10:30:00Z"}
    resources: dict[str, Any] = {"config/downloadclient": {"id": 1, "autoRedownloadFailed": False}}
    async with arr_standing_in("sonarr", **resources) as sonarr:
        sonarr.keep("series", kept_series("Breaking Bad", 81189, 3))
        sonarr.keep("history", {**found, "id": 7, "eventType": "grabbed", "downloadId": item})
        tv = await desk.add("TV", "sonarr", sonarr.url, KEY)
        usenet = await desk.add("Usenet", "sabnzbd", sabnzbd.url, sabnzbd.key)
        async with desk.database.transaction() as session:
            usenet.connected_as_of = usenet.connected_as_of.replace(year=2025)
            await session.merge(usenet)
        await desk.policy(grace_minutes=1000)
        await desk.watch()
        await desk.recover()
        mine = [one for one in await desk.recoveries() if one.item == item]
        assert [(one.decision, one.service_id, one.outcome) for one in mine] == [("wait", tv.id, "noted")]
        await desk.policy(grace_minutes=0, max_retries=0)
        await desk.recover()
        marked = [one for one in await desk.recoveries() if one.decision == "mark_failed"]
        assert [(one.item, one.outcome, one.searched, one.content) for one in marked] == [
            (item, "done", True, ["series:3", "episode:12"])
        ]
        assert [asked.path for asked in sonarr.asked if asked.method == "POST"] == [
            "/api/v3/history/failed/7",
            "/api/v3/command",
        ]
        assert sonarr.commands == [{"name": "EpisodeSearch", "episodeIds": [12]}]


async def test_folders_that_nobody_knows_are_found_and_go_only_by_policy(
    sabnzbd: Running, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = sabnzbd.folder / "complete"
    old, new = complete / "_FAILED_Old", complete / "_FAILED_New"
    for folder in (old, new, complete / "Good"):
        folder.mkdir(parents=True, exist_ok=True)
    os.utime(old, (0, 0))
    await desk.add("Usenet", "sabnzbd", sabnzbd.url, sabnzbd.key)
    await desk.policy(max_retries=0)
    for _ in range(2):
        await desk.recover()
    reported = [one.title for one in await desk.recoveries() if one.decision == "report"]
    assert sorted(reported) == ["_FAILED_New", "_FAILED_Old"]  # each once, and none that is known
    await desk.policy(max_retries=0, leftovers="remove")
    await desk.recover()
    assert old.exists()  # nobody has said that this folder is SABnzbd's
    monkeypatch.setenv("FORGEARR_MEDIA__FOLDERS", f"{{{complete}: {complete}}}")
    get_settings.cache_clear()
    await desk.recover()
    assert [old.exists(), new.exists()] == [False, True]
    removed = [one for one in await desk.recoveries() if one.decision == "remove_folder"]
    assert [(one.item, one.outcome) for one in removed] == [(str(old), "done")]


# What the real one here does not say


def saying(
    queue: list[Any], history: list[Any], folder: str = "/data/complete", speed: str = "0.00"
) -> Callable[[Asked], Reply]:
    """A SABnzbd with these downloads, and no category."""
    answers: dict[str, Any] = {
        "queue": {"queue": {"slots": queue, "status": "Idle", "kbpersec": speed}},
        "history": {"history": {"slots": history, "last_history_update": 1}},
        "fullstatus": {"status": {"completedir": folder}},
        "get_config": {"config": {}},
    }
    return lambda asked: telling(answers[asked.query["mode"]])


async def test_what_is_still_being_moved_has_not_ended(desk: Desk, ear: Ear) -> None:
    """Releases 4 and 5 call it completed before that."""
    slot = {"nzo_id": "1", "name": "Film", "status": "Completed", "completed": int(time.time()) + 3600, "loaded": True}
    async with standing_in(saying([], [slot])) as server:
        await desk.add("Usenet", "sabnzbd", server.url, KEY)
        await desk.watch()
        row = (await desk.downloads())["1"]
        assert (row.state, row.ended_at) == ("processing", None)
        slot["loaded"] = False
        await desk.watch()
        assert (await desk.downloads())["1"].ended_at is not None


async def test_what_ends_between_two_questions_is_told_once(desk: Desk, ear: Ear) -> None:
    queue = [{"nzo_id": "1", "filename": "Film", "status": "Downloading", "mbleft": "0.50"}]
    failed = {"nzo_id": "1", "name": "Film", "status": "Failed", "completed": int(time.time()) + 3600}
    async with standing_in(saying(queue, [failed])) as server:
        await desk.add("Usenet", "sabnzbd", server.url, KEY)
        first = await desk.watch()
        assert (first["failed"], (await desk.downloads())["1"].state) == (1, "failed")
        assert (await desk.followed()).underway == 0
        queue.clear()
        assert (await desk.watch())["failed"] == 0
    assert (len(ear.of("download.failed")), (await desk.followed()).failed) == (1, 1)


async def test_an_id_that_cannot_be_kept_hides_no_other_service(sabnzbd: Running, desk: Desk) -> None:
    async with standing_in(saying([{"nzo_id": "x" * 301, "status": "Queued"}], [])) as server:
        await desk.add("Odd", "sabnzbd", server.url, KEY)
        await desk.add("Usenet", "sabnzbd", sabnzbd.url, sabnzbd.key)
        told = await desk.watch()
        assert (told["looked_at"], list(told["unseen"])) == (1, ["Odd"])


async def test_what_stands_still_is_replaced_by_who_chose_it(desk: Desk) -> None:
    slot = {"nzo_id": "SABnzbd_nzo_1", "filename": "Still", "status": "Downloading", "mbleft": "953.67"}
    resources: dict[str, Any] = {"config/downloadclient": {"id": 1, "autoRedownloadFailed": False}}
    async with (
        standing_in(saying([slot], [], speed="512.00")) as server,
        arr_standing_in("sonarr", **resources) as sonarr,
    ):
        sonarr.keep("series", kept_series("Breaking Bad", 81189, 3))
        sonarr.keep("queue", queued("Still", 1, seriesId=3, episodeId=12))
        tv = await desk.add("TV", "sonarr", sonarr.url, KEY)
        await desk.add("Usenet", "sabnzbd", server.url, KEY)
        await desk.policy(strikes=2, stuck_minutes=0)
        for _ in range(3):
            await desk.watch()
        await desk.recover()
        (one,) = await desk.recoveries()
        assert (one.service_id, one.decision, one.outcome, one.searched) == (tv.id, "replace", "done", True)
        assert (sonarr.rows("queue"), sonarr.commands) == ([], [{"name": "EpisodeSearch", "episodeIds": [12]}])


async def test_nobody_looks_again_and_again_for_folders_of_who_does_not_answer(desk: Desk) -> None:
    await desk.policy()
    away = await desk.add("Away", "sabnzbd", "http://127.0.0.1:9", KEY)
    assert (await desk.watch())["recover_job_id"] is None
    async with standing_in(saying([], [])) as server:
        async with desk.database.transaction() as session:
            away.url = server.url
            await session.merge(away)
        assert (await desk.watch())["recover_job_id"]


async def test_a_folder_stays_where_the_policy_only_reports_by_now(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete, looks = tmp_path / "complete", 0
    old = complete / "_FAILED_Old"
    old.mkdir(parents=True)
    os.utime(old, (0, 0))
    monkeypatch.setenv("FORGEARR_MEDIA__FOLDERS", f"{{{complete}: {complete}}}")
    get_settings.cache_clear()
    told = saying([], [], folder=str(complete))

    def answer(asked: Asked) -> Reply:
        """It is away just when the folder is to be removed."""
        nonlocal looks
        looks += asked.query["mode"] == "fullstatus"
        return telling({}, 503) if looks == 2 else told(asked)

    async with standing_in(answer) as server:
        await desk.add("Usenet", "sabnzbd", server.url, KEY)
        await desk.policy(leftovers="remove")
        await desk.recover()
        assert await desk.decisions() == [("remove_folder", "begun")]
        await desk.policy(leftovers="report")
        await desk.resume()
        assert (await desk.decisions(), old.exists()) == ([("remove_folder", "overtaken"), ("report", "noted")], True)


async def test_a_folder_that_cannot_be_read_ends_nothing(desk: Desk) -> None:
    async with standing_in(saying([], [], folder=f"/{'x' * 300}")) as server:
        await desk.add("Usenet", "sabnzbd", server.url, KEY)
        await desk.watch()
        await desk.policy()
        await desk.recover()
        assert (await desk.followed()).leftovers_at is not None
