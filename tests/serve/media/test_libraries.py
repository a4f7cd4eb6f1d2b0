"""/api/v1/media, with a fake Plex."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from cluster.db import Database
from cluster.services import store as service_store
from serve.app import create_app
from tests.support.services.fake_services import FAKE_SERVICES, KEY
from tests.support.services.stub_server import (
    StubRequest,
    StubResponse,
    StubServer,
    html_page,
    json_response,
    stub_server,
    text_response,
)

MEDIA = "/api/v1/media"
pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)

SECTIONS = [
    {
        "allowSync": True,
        "key": "1",
        "type": "movie",
        "title": 'Movies "4K" 🎬',
        "agent": "tv.plex.agents.movie",
        "scanner": "Plex Movie",
        "language": "en-US",
        "uuid": "7d4d2cbf-7c4a-4a6e-9f1d-0c5f7f0a2f5e",
        "updatedAt": 1736329500,
        "Location": [{"id": 1, "path": "/movies"}],
    },
    {"key": "2", "type": "show", "title": "TV Shows", "agent": "tv.plex.agents.series", "scanner": "Plex TV Series"},
]
COUNTS = {"1": 450, "2": 75}
ADDED = [
    {
        "ratingKey": "10",
        "type": "movie",
        "title": "The Matrix",
        "librarySectionTitle": "Movies",
        "librarySectionID": 1,
        "year": 1999,
        "rating": 8.2,
        "audienceRating": 8.5,
        "addedAt": 1736328600,
    },
    {
        "type": "episode",
        "title": "Pilot",
        "grandparentTitle": "Breaking Bad",
        "parentTitle": "Season 1",
        "index": 1,
        "parentIndex": 1,
        "librarySectionTitle": "TV Shows",
        "audienceRating": 9.1,
        "addedAt": 1736242200,
    },
    {"type": "season", "title": "Season 2", "parentTitle": "Lost", "index": 2},
]


class Plex:
    """A Plex with two libraries."""

    def __init__(self) -> None:
        self.scanned: list[str] = []
        self.replies: dict[str, StubResponse] = {}

    def __call__(self, request: StubRequest) -> StubResponse:
        if request.headers.get("x-plex-token") != KEY:
            return FAKE_SERVICES["plex"](request)
        if request.path in self.replies:
            return self.replies[request.path]
        match request.path.split("/")[1:]:
            case ["library", "sections"]:
                return container(Directory=SECTIONS)
            case ["library", "sections", key, "all"] if key in COUNTS:
                assert request.query["X-Plex-Container-Size"] == "0"
                return container(size=0, totalSize=COUNTS[key], offset=0)
            case ["library", "sections", key, "refresh"] if key in COUNTS:
                self.scanned.append(key)
                return StubResponse(b"", 200, "text/html")
            case ["library", "recentlyAdded"]:
                return container(Metadata=ADDED[: int(request.query["X-Plex-Container-Size"])])
            case _:
                return html_page("Not Found", 404)


def container(**fields: Any) -> StubResponse:
    return json_response({"MediaContainer": {"size": 0, "allowSync": False, **fields}})


@pytest.fixture
async def plex() -> Plex:
    return Plex()


@pytest.fixture
async def server(plex: Plex) -> AsyncIterator[StubServer]:
    async with stub_server(plex) as server:
        yield server


@pytest.fixture
async def client(database: Database, server: StubServer) -> AsyncIterator[httpx.AsyncClient]:
    async with database.transaction() as session:
        await service_store.create(session, {"name": "Home", "type": "plex", "url": server.url, "api_key": KEY}, "ada")
    transport = httpx.ASGITransport(create_app())
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", timeout=60) as client:
        yield client


async def test_libraries_are_listed(client: httpx.AsyncClient) -> None:
    assert (await client.get(f"{MEDIA}/libraries")).json() == {
        "libraries": [
            {
                "key": "1",
                "title": 'Movies "4K" 🎬',
                "type": "movie",
                "scanner": "Plex Movie",
                "agent": "tv.plex.agents.movie",
                "count": 450,
            },
            {
                "key": "2",
                "title": "TV Shows",
                "type": "show",
                "scanner": "Plex TV Series",
                "agent": "tv.plex.agents.series",
                "count": 75,
            },
        ]
    }


async def test_a_plex_without_libraries_has_empty_lists(client: httpx.AsyncClient, plex: Plex) -> None:
    plex.replies = {"/library/sections": container(), "/library/recentlyAdded": container()}
    assert (await client.get(f"{MEDIA}/libraries")).json() == {"libraries": []}
    assert (await client.get(f"{MEDIA}/recently-added")).json() == {"items": [], "total": 0}
    response = await client.post(f"{MEDIA}/scan", json={"library_key": "1"})
    assert (response.status_code, response.json()["message"]) == (404, "There is no library '1'. There are: none.")


async def test_recently_added_items_are_listed(client: httpx.AsyncClient) -> None:
    body = (await client.get(f"{MEDIA}/recently-added")).json()
    assert body["total"] == 3
    assert body["items"][0] == {
        "title": "The Matrix",
        "year": 1999,
        "type": "movie",
        "added_at": "2025-01-08T09:30:00Z",
        "library": "Movies",
        "rating": 8.2,
    }
    episode, season = body["items"][1:]
    assert (episode["title"], episode["rating"], episode["year"]) == ("Breaking Bad - S01E01 - Pilot", 9.1, None)
    assert (season["title"], season["added_at"], season["library"]) == ("Lost - Season 2", None, None)
    assert (await client.get(f"{MEDIA}/recently-added?limit=1")).json()["total"] == 1


async def test_a_scan_is_triggered_for_a_known_library(client: httpx.AsyncClient, plex: Plex) -> None:
    response = await client.post(f"{MEDIA}/scan", json={"library_key": "2"})
    assert response.json() == {"success": True, "message": "Library scan triggered", "library": "TV Shows"}
    for key in ("3", "1/../2", "all", "' OR 1=1", "🎬", "1 "):
        response = await client.post(f"{MEDIA}/scan", json={"library_key": key})
        assert (response.status_code, response.json()["error_code"]) == (404, "LIBRARY_NOT_FOUND")
        assert '1 (Movies "4K" 🎬), 2 (TV Shows)' in response.json()["message"]
    for body in ({}, {"library_key": 2}, {"library_key": ""}, {"library_key": 200 * "x"}, {"library_key": "1", "a": 1}):
        assert (await client.post(f"{MEDIA}/scan", json=body)).status_code == 422
    assert plex.scanned == ["2"]


@pytest.mark.parametrize("limit", [0, -1, 501, 10**30, "all"])
async def test_an_invalid_limit_is_refused(client: httpx.AsyncClient, limit: object) -> None:
    assert (await client.get(f"{MEDIA}/recently-added?limit={limit}")).status_code == 422


@pytest.mark.parametrize(
    ("path", "reply"),
    [
        ("/library/sections", json_response({"MediaContainer": None})),
        ("/library/sections", json_response({"MediaContainer": {"Directory": [{"key": None}]}})),
        ("/library/sections", json_response({"MediaContainer": {"Directory": "many"}})),
        ("/library/sections", html_page("Plex")),
        ("/library/sections", text_response('{"MediaContainer"')),
        ("/library/sections/1/all", container(size="lots")),
        ("/library/sections/1/all", json_response(7)),
        ("/library/recentlyAdded", container(Metadata=[{"type": "movie", "title": "A", "addedAt": 1e300}])),
        ("/library/recentlyAdded", container(Metadata=[{"type": "movie", "title": "A", "rating": "good"}])),
        ("/library/recentlyAdded", container(Metadata=[{"type": "movie"}])),
    ],
)
async def test_a_malformed_response_is_one_clear_error(
    client: httpx.AsyncClient, plex: Plex, path: str, reply: StubResponse
) -> None:
    plex.replies = {path: reply}
    route = "recently-added" if "recently" in path else "libraries"
    response = await client.get(f"{MEDIA}/{route}")
    assert (response.status_code, response.json()["error_code"]) == (503, "SERVICE_BAD_RESPONSE")
    assert "Home" in response.json()["message"]


async def test_a_wrong_token_is_reported(client: httpx.AsyncClient, server: StubServer) -> None:
    service = (await client.get("/api/services")).json()[0]
    await client.put(f"/api/services/{service['id']}", json={"api_key": "another"})
    response = await client.get(f"{MEDIA}/libraries")
    assert (response.status_code, response.json()["error_code"]) == (503, "SERVICE_UNAUTHORIZED")
