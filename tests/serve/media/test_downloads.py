"""/api/v1/downloads, with a real SABnzbd and a news server, and with a SABnzbd that sends malformed responses."""

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest

from cluster.db import Database, now
from cluster.services import store as service_store
from serve.app import create_app
from tests.support.services import news_server, real_services
from tests.support.services.news_server import NewsServer
from tests.support.services.real_services import RunningService
from tests.support.services.stub_server import (
    StubRequest,
    StubResponse,
    StubServer,
    html_page,
    json_response,
    stub_server,
    text_response,
)
from tests.support.waiting import eventually

DOWNLOADS = "/api/v1/downloads"
NAME = 'Our "Movie" & <i>Ünïcode 🎬 100%'
# Requests to SABnzbd do not depend on Forgearr's own database.
pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


@pytest.fixture(scope="module")
def news() -> Iterator[NewsServer]:
    with news_server.running_news_server() as news:
        yield news


@pytest.fixture(scope="module")
def sabnzbd(tmp_path_factory: pytest.TempPathFactory, news: NewsServer) -> Iterator[RunningService]:
    with real_services.sabnzbd(tmp_path_factory.mktemp("sabnzbd")) as running:
        news_server.add_news_server(running, news)
        yield running


@pytest.fixture
async def client(database: Database) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app())
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", timeout=60) as client:
        yield client


@pytest.fixture
async def real(client: httpx.AsyncClient, database: Database, sabnzbd: RunningService) -> httpx.AsyncClient:
    """A client of a server to which the real SABnzbd is connected."""
    await connect(database, sabnzbd.url, sabnzbd.key)
    return client


async def connect(database: Database, url: str, key: str = "key", name: str = "Usenet") -> None:
    async with database.transaction() as session:
        await service_store.create(session, {"name": name, "type": "sabnzbd", "url": url, "api_key": key}, "ada")


async def call(client: httpx.AsyncClient, path: str, method: str = "GET", **parameters: Any) -> dict[str, Any]:
    response = await client.request(method, f"{DOWNLOADS}{path}", params=parameters)
    assert response.status_code == 200, response.text
    return response.json()


async def call_error(client: httpx.AsyncClient, path: str, method: str = "GET", **parameters: Any) -> tuple[int, str]:
    response = await client.request(method, f"{DOWNLOADS}{path}", params=parameters)
    return response.status_code, response.json()["error_code"]


async def test_the_queue_of_a_real_sabnzbd(real: httpx.AsyncClient, sabnzbd: RunningService, news: NewsServer) -> None:
    with news.paused():
        nzo_id = news_server.add_download(sabnzbd, news.post("movie.mkv", secrets.token_bytes(3_000_000)), NAME)
        news_server.wait_until_stalled(sabnzbd, news)
        queue = await call(real, "/queue")
        (slot,) = queue["queue"]
        assert slot == {
            "nzo_id": nzo_id,
            "filename": slot["filename"],
            "mb_left": pytest.approx(2.95, abs=0.1),
            "mb": pytest.approx(2.95, abs=0.1),
            "percentage": 0,
            "eta": None,
            "status": "Downloading",
            "priority": "Normal",
        }
        assert all(word in slot["filename"] for word in ("Movie", "Ünïcode", "🎬", "100%"))
        assert (queue["speed"], queue["size_left"], queue["paused"]) == ("0 B/s", f"{slot['mb']:.1f} MB", False)
        assert queue["disk_space"].endswith(("GB", "TB"))
        assert await call(real, "/pause", "POST") == {"success": True, "paused": True, "queue_status": "Paused"}
        assert news_server.call_api(sabnzbd, "queue")["queue"]["paused"] is True
        assert (await call(real, "/queue"))["paused"] is True
        assert await call(real, "/resume", "POST") == {"success": True, "paused": False, "queue_status": "Idle"}
        assert news_server.call_api(sabnzbd, "queue")["queue"]["paused"] is False

        absent = {(404, "DOWNLOAD_NOT_FOUND"), (404, "NOT_FOUND")}
        for none in ("SABnzbd_nzo_none", "all", f"{nzo_id},all", f"{nzo_id}%2Fx", 400 * "9", "%F0%9F%8E%AC", "%22'"):
            assert await call_error(real, f"/{none}", "DELETE") in absent, none
            assert await call_error(real, f"/retry/{none}", "POST") in absent, none
        assert await call_error(real, f"/retry/{nzo_id}", "POST") == (409, "DOWNLOAD_NOT_FAILED")
        assert [slot["nzo_id"] for slot in (await call(real, "/queue"))["queue"]] == [nzo_id]

        deleted = {"success": True, "message": "Download deleted successfully", "nzo_id": nzo_id}
        assert await call(real, f"/{nzo_id}", "DELETE") == deleted
        assert news_server.call_api(sabnzbd, "queue")["queue"]["slots"] == []
        assert not [*sabnzbd.folder.glob("incomplete/*")]
        assert await call_error(real, f"/{nzo_id}", "DELETE") == (404, "DOWNLOAD_NOT_FOUND")


async def test_a_failed_download_is_retried(real: httpx.AsyncClient, sabnzbd: RunningService, news: NewsServer) -> None:
    content = secrets.token_bytes(300_000)
    completed_id = news_server.add_download(sabnzbd, news.post("whole.mkv", content), f"{NAME} whole")
    completed_at = news_server.finished_download(sabnzbd, completed_id)["completed"]
    eventually(lambda: time.time() > completed_at + 1)  # SABnzbd reports whole seconds
    failed_id = news_server.add_download(
        sabnzbd, news.post("broken.mkv", content[::-1], lost=4), "Broken", cat="movies"
    )
    news_server.finished_download(sabnzbd, failed_id)
    history = await call(real, "/history")
    failed, completed = history["history"]
    assert history["total"] == 2
    assert failed == {
        "nzo_id": failed_id,
        "name": "Broken",
        "category": "movies",
        "status": "Failed",
        "fail_message": failed["fail_message"],
        "size": "0 B",
        "completed": failed["completed"],
    }
    assert "Not on your server" in failed["fail_message"]
    assert (completed["nzo_id"], completed["status"], completed["fail_message"]) == (completed_id, "Completed", "")
    assert (completed["size"][:2], completed["size"][-3:], completed["completed"][-1]) == ("30", " KB", "Z")
    assert now() - datetime.fromisoformat(completed["completed"]) < timedelta(hours=1)
    first = await call(real, "/history", limit=1)
    assert ([slot["nzo_id"] for slot in first["history"]], first["total"]) == ([failed_id], 2)

    assert await call_error(real, f"/retry/{completed_id}", "POST") == (409, "DOWNLOAD_NOT_FAILED")
    assert await call_error(real, f"/{completed_id}", "DELETE") == (404, "DOWNLOAD_NOT_FOUND")
    news.restore_lost()
    again = await call(real, f"/retry/{failed_id}", "POST")
    assert again == {
        "success": True,
        "message": "Download retried successfully",
        "nzo_id": failed_id,
        "new_nzo_id": again["new_nzo_id"],
    }
    assert again["new_nzo_id"] != failed_id
    assert news_server.finished_download(sabnzbd, again["new_nzo_id"])["status"] == "Completed"
    assert await call_error(real, f"/retry/{failed_id}", "POST") == (404, "DOWNLOAD_NOT_FOUND")


@pytest.mark.parametrize("limit", [0, -1, 1001, 10**30, "many", ""])
async def test_an_invalid_limit_is_refused(client: httpx.AsyncClient, limit: object) -> None:
    assert await call_error(client, "/history", limit=limit) == (422, "VALIDATION_ERROR")


async def test_without_a_service_the_error_explains_how_to_connect_one(
    client: httpx.AsyncClient, database: Database
) -> None:
    response = await client.get(f"{DOWNLOADS}/queue")
    assert (response.status_code, response.json()["error_code"]) == (503, "NO_SUCH_SERVICE_CONNECTED")
    assert "POST /api/services: SABnzbd" in response.json()["message"]
    async with database.transaction() as session:
        await service_store.create(session, {"name": "TV", "type": "sonarr", "url": "http://127.0.0.1:9"}, "ada")
        off = {"name": "Off", "type": "sabnzbd", "url": "http://127.0.0.1:9", "enabled": False}
        await service_store.create(session, off, "ada")
    assert await call_error(client, "/queue") == (503, "NO_SUCH_SERVICE_CONNECTED")
    assert await call_error(client, "/queue", service="Off") == (503, "NO_SUCH_SERVICE_CONNECTED")
    assert await call_error(client, "/queue", service="TV") == (400, "SERVICE_CANNOT")
    assert await call_error(client, "/queue", service="nobody") == (404, "SERVICE_NOT_FOUND")


# A SABnzbd that misbehaves

SLOT = {
    "nzo_id": "SABnzbd_nzo_1",
    "filename": "Film",
    "mb": "2048.00",
    "mbleft": "1536.50",
    "percentage": "25",
    "timeleft": "0:15:30",
    "status": "Downloading",
    "priority": "Normal",
}
QUEUE = {
    "slots": [SLOT],
    "paused": False,
    "status": "Downloading",
    "kbpersec": "5324.80",
    "mbleft": "15564.80",
    "diskspace1": "250.50",
}
ENDED = {"nzo_id": "SABnzbd_nzo_1", "name": "Film", "status": "Completed", "bytes": 1610612736, "completed": 1736329500}


class StubSabnzbd:
    """A SABnzbd that sends the response it is given."""

    def __init__(self, server: StubServer) -> None:
        self.server = server
        self.reply = json_response({"queue": QUEUE})

    def respond(self, request: StubRequest) -> StubResponse:
        return self.reply


@pytest.fixture
async def stub(database: Database) -> AsyncIterator[StubSabnzbd]:
    async with stub_server(lambda request: stub.respond(request)) as server:
        stub = StubSabnzbd(server)
        await connect(database, server.url)
        yield stub


async def test_sizes_and_times_are_converted(client: httpx.AsyncClient, stub: StubSabnzbd) -> None:
    assert await call(client, "/queue") == {
        "queue": [
            {
                "nzo_id": "SABnzbd_nzo_1",
                "filename": "Film",
                "mb_left": 1536.5,
                "mb": 2048.0,
                "percentage": 25,
                "eta": "00:15:30",
                "status": "Downloading",
                "priority": "Normal",
            }
        ],
        "speed": "5.2 MB/s",
        "size_left": "15.2 GB",
        "paused": False,
        "disk_space": "250.5 GB",
    }
    stub.reply = json_response({"history": {"slots": [ENDED], "noofslots": 150}})
    history = await call(client, "/history")
    assert (history["history"][0]["size"], history["history"][0]["completed"]) == ("1.5 GB", "2025-01-08T09:45:00Z")
    # SABnzbd 4 and 5 report this while they move unpacked files.
    stub.reply = json_response({"history": {"slots": [{**ENDED, "loaded": True}], "noofslots": 150}})
    assert (await call(client, "/history"))["history"][0]["completed"] is None


@pytest.mark.parametrize(
    ("left", "eta"),
    [
        ("0:00:00", None),
        ("2:01:00:05", "49:00:05"),
        (None, None),
        ("soon", None),
        ("1:2:3:4:5", None),
        ("\u0663:\u0660:\u0660", None),
    ],
)
async def test_an_unknown_time_left_is_null(
    client: httpx.AsyncClient, stub: StubSabnzbd, left: str | None, eta: str | None
) -> None:
    stub.reply = json_response({"queue": {**QUEUE, "slots": [{**SLOT, "timeleft": left}]}})
    assert (await call(client, "/queue"))["queue"][0]["eta"] == eta


async def test_a_download_that_finishes_before_its_deletion_is_not_deleted(
    client: httpx.AsyncClient, stub: StubSabnzbd, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = [SLOT]

    def respond(request: StubRequest) -> StubResponse:
        if request.query.get("name") == "delete":
            slots.clear()
            return json_response({"status": False, "nzo_ids": []})
        return json_response({"queue": {**QUEUE, "slots": slots}})

    monkeypatch.setattr(stub, "respond", respond)
    response = await client.delete(f"{DOWNLOADS}/{SLOT['nzo_id']}")
    assert (response.status_code, "had already left the queue" in response.json()["message"]) == (404, True)


async def test_a_stalled_download_has_no_estimated_time(client: httpx.AsyncClient, stub: StubSabnzbd) -> None:
    # SABnzbd may round a speed to 0.00 and still estimate 198 hours.
    slow = {**QUEUE, "kbpersec": "0.00", "slots": [{**SLOT, "timeleft": "8:06:47:49"}]}
    stub.reply = json_response({"queue": slow})
    queue = await call(client, "/queue")
    assert (queue["speed"], queue["queue"][0]["eta"]) == ("0 B/s", None)


@pytest.mark.parametrize(
    "reply",
    [
        json_response({"queue": {**QUEUE, "slots": None}}),
        json_response({"queue": {**QUEUE, "slots": [{**SLOT, "mb": "a lot"}]}}),
        json_response({"queue": {**QUEUE, "slots": [{**SLOT, "mb": "1e999"}]}}),
        json_response({"queue": {**QUEUE, "slots": [{**SLOT, "percentage": 9000 * "9"}]}}),
        json_response({"queue": {**QUEUE, "slots": [{**SLOT, "nzo_id": None}]}}),
        json_response({"queue": {**QUEUE, "slots": [None]}}),
        json_response({"queue": {**QUEUE, "paused": "perhaps"}}),
        json_response({"queue": []}),
        json_response({"queue": None}),
        json_response([]),
        json_response(None),
        html_page("Welcome"),
        text_response('{"queue": {"slots": ['),
    ],
)
async def test_a_malformed_response_is_one_clear_error(
    client: httpx.AsyncClient, stub: StubSabnzbd, reply: StubResponse
) -> None:
    stub.reply = reply
    response = await client.get(f"{DOWNLOADS}/queue")
    assert (response.status_code, response.json()["error_code"]) == (503, "SERVICE_BAD_RESPONSE")
    assert "Usenet" in response.json()["message"]
    stub.reply = json_response({"queue": QUEUE})
    assert len((await call(client, "/queue"))["queue"]) == 1


async def test_malformed_responses_open_the_circuit_breaker_and_a_valid_one_closes_it(
    client: httpx.AsyncClient, stub: StubSabnzbd
) -> None:
    stub.reply = json_response({"history": {"slots": [{**ENDED, "completed": 1e300}], "noofslots": 1}})
    for _ in range(5):
        assert await call_error(client, "/history") == (503, "SERVICE_BAD_RESPONSE")
    before = len(stub.server.requests)
    response = await client.get(f"{DOWNLOADS}/queue")
    assert (response.status_code, response.json()["error_code"]) == (503, "SERVICE_CIRCUIT_OPEN")
    assert int(response.headers["Retry-After"]) <= 60
    assert len(stub.server.requests) == before
    stub.reply = json_response({"queue": {**QUEUE, "version": "3.7.1"}})
    assert (await client.get("/health/sabnzbd")).status_code == 200
    assert len((await call(client, "/queue"))["queue"]) == 1


async def test_a_reported_success_is_verified(client: httpx.AsyncClient, stub: StubSabnzbd) -> None:
    """SABnzbd reports success without having done anything."""
    stub.reply = json_response({"status": True, "nzo_id": "SABnzbd_nzo_2", "queue": QUEUE})
    assert await call_error(client, "/pause", "POST") == (400, "REFUSED_BY_SERVICE")
    assert await call_error(client, "/SABnzbd_nzo_1", "DELETE") == (400, "REFUSED_BY_SERVICE")
    for retry in (1, 0):
        history = {"slots": [{**ENDED, "status": "Failed", "retry": retry}], "noofslots": 1}
        stub.reply = json_response({"status": True, "nzo_id": "SABnzbd_nzo_2", "queue": QUEUE, "history": history})
        assert await call_error(client, "/retry/SABnzbd_nzo_1", "POST") == (400, "REFUSED_BY_SERVICE")


async def test_an_error_in_the_body_and_a_wrong_key_are_reported(client: httpx.AsyncClient, stub: StubSabnzbd) -> None:
    stub.reply = json_response({"status": False, "error": "not today"})
    assert await call_error(client, "/queue") == (400, "REFUSED_BY_SERVICE")
    stub.reply = text_response("API Key Incorrect", 403)
    assert await call_error(client, "/queue") == (503, "SERVICE_UNAUTHORIZED")
