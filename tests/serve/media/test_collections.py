"""/api/v1/shows and /api/v1/movies, on the whole application, with a fake Sonarr and Radarr that keep state."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from cluster import events
from cluster.services import store as service_store
from cluster.services.capabilities import collection as capabilities_collection
from cluster.services.http.client import Client
from cluster.settings import get_settings
from serve.http import json_stream
from tests.support.api_client import ApiClient
from tests.support.services.fake_arr import (
    FakeArr,
    fake_arr,
    library_movie,
    library_series,
    movie,
    root_folder,
    series,
)
from tests.support.services.fake_services import KEY
from tests.support.services.stub_server import (
    StubRequest,
    StubResponse,
    html_page,
    json_response,
    stub_server,
    text_response,
)
from tests.support.waiting import TIMEOUT

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)

WEIRD = 'The "Wire" \\ 🎬 <b>ü</b>'


@dataclass(frozen=True)
class MediaType:
    """The differences between shows and movies."""

    service: str
    path: str
    list_field: str
    external_id: str
    external_id_field: str
    title: str
    search: dict[str, Any]
    library_row: Callable[..., dict[str, Any]] = field(repr=False)
    lookup_row: Callable[..., dict[str, Any]] = field(repr=False)

    @property
    def resource(self) -> str:
        return "series" if self.service == "sonarr" else "movie"


SHOWS = MediaType(
    "sonarr",
    "/api/v1/shows/",
    "series",
    "tvdbId",
    "tvdb_id",
    "Series",
    {"name": "SeriesSearch", "seriesId": 1},
    library_series,
    series,
)
MOVIES = MediaType(
    "radarr",
    "/api/v1/movies/",
    "movies",
    "tmdbId",
    "tmdb_id",
    "Movie",
    {"name": "MoviesSearch", "movieIds": [1]},
    library_movie,
    movie,
)
BOTH = pytest.mark.parametrize("media_type", [SHOWS, MOVIES], ids=lambda media_type: media_type.service)


async def connect(api: ApiClient, media_type: MediaType, url: str, **fields: Any) -> None:
    values = {"name": media_type.service, "type": media_type.service, "url": url, "api_key": KEY, **fields}
    async with api.database.transaction() as session:
        await service_store.create(session, values, "ada")


@asynccontextmanager
async def stocked_service(
    api: ApiClient,
    media_type: MediaType,
    before: Callable[[StubRequest], StubResponse | None] = lambda request: None,
    **resources: Any,
) -> AsyncGenerator[FakeArr]:
    """A service with two shows or movies, whose lookup finds two more."""
    rows = [media_type.library_row("Breaking Bad", 81189, 1), media_type.library_row(WEIRD, 79126, 2)]
    async with fake_arr(media_type.service, before, **{media_type.resource: rows, **resources}) as arr:
        arr.lookup_results += [
            media_type.lookup_row("Breaking Bad", 81189),
            media_type.lookup_row("Inception", 27205, 2010),
        ]
        await connect(api, media_type, arr.url)
        yield arr


async def expect_error(response: httpx.Response, status: int, code: str) -> str:
    body = response.json()
    assert (response.status_code, body["error_code"]) == (status, code), response.text
    return body["message"]


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> list[events.Message]:
    """The messages that are published. No actor delivers them here."""
    messages: list[events.Message] = []
    monkeypatch.setattr(events, "publish", messages.extend)
    return messages


# Listing


async def test_shows_are_serialized_as_documented(api: ApiClient) -> None:
    async with stocked_service(api, SHOWS):
        listed = (await api.request("ada", "GET", "/api/v1/shows/")).json()
        assert listed["total"] == 2
        assert listed["series"][0] == {
            "id": 1,
            "title": "Breaking Bad",
            "tvdbId": 81189,
            "status": "ended",
            "overview": "What happens in Breaking Bad.",
            "network": "AMC",
            "year": 2008,
            "seasons": 1,
            "episodeCount": 7,
            "monitored": True,
            "qualityProfileId": 1,
            "path": "/tv/Breaking Bad",
        }
        assert listed["series"][1]["title"] == WEIRD
        assert (await api.request("ada", "GET", "/api/v1/shows")).json() == listed
        assert (await api.request("ada", "GET", "/api/v1/shows/1")).json() == {
            "id": 1,
            "title": "Breaking Bad",
            "tvdbId": 81189,
            "status": "ended",
            "overview": "What happens in Breaking Bad.",
            "network": "AMC",
            "year": 2008,
            "seasons": [
                {"seasonNumber": 0, "monitored": False, "statistics": None},
                {
                    "seasonNumber": 1,
                    "monitored": True,
                    "statistics": {"episodeCount": 7, "episodeFileCount": 7, "percentOfEpisodes": 100.0},
                },
            ],
            "qualityProfileId": 1,
            "path": "/tv/Breaking Bad",
            "monitored": True,
            "sizeOnDisk": 15360000000,
        }


async def test_movies_are_serialized_as_documented(api: ApiClient) -> None:
    async with stocked_service(api, MOVIES) as radarr:
        row = {
            "id": 1,
            "title": "Breaking Bad",
            "year": 1999,
            "tmdbId": 81189,
            "status": "released",
            "overview": "What happens in Breaking Bad.",
            "runtime": 136,
            "monitored": True,
            "qualityProfileId": 1,
            "path": "/movies/Breaking Bad (1999)",
            "hasFile": True,
            "sizeOnDisk": 8589934592,
        }
        listed = (await api.request("ada", "GET", "/api/v1/movies/")).json()
        assert (listed["total"], listed["movies"][0], listed["movies"][1]["title"]) == (2, row, WEIRD)
        assert (await api.request("ada", "GET", "/api/v1/movies")).json() == listed
        assert (await api.request("ada", "GET", "/api/v1/movies/1")).json() == {
            **row,
            "genres": ["Action", "Science Fiction"],
            "ratings": {"value": 8.2, "votes": 18500},
            "movieFile": {
                "relativePath": "Breaking Bad.mkv",
                "size": 8589934592,
                "quality": {"quality": {"name": "Bluray-1080p"}},
            },
        }
        # Unknown values are null, such as the ratings of a new movie.
        radarr.add_row("movie", {"title": "New", "tmdbId": 5})
        body = (await api.request("ada", "GET", "/api/v1/movies/3")).json()
        assert (body["year"], body["ratings"], body["movieFile"], body["genres"]) == (None, None, None, None)


@BOTH
async def test_a_list_is_filtered_and_paginated(api: ApiClient, media_type: MediaType) -> None:
    rows = [
        media_type.library_row(f"{'Star' if number % 2 else 'Moon'} {number}", number, number) for number in range(1, 8)
    ]
    resources: dict[str, Any] = {media_type.resource: rows}
    async with stocked_service(api, media_type, **resources):
        for query, ids, total in (
            ("limit=2", [1, 2], 7),
            ("limit=2&offset=5", [6, 7], 7),
            ("offset=7", [], 7),
            ("query=star", [1, 3, 5, 7], 4),
            ("query=STAR&offset=1&limit=2", [3, 5], 4),
            ("query=none", [], 0),
        ):
            listed = (await api.request("ada", "GET", f"{media_type.path}?{query}")).json()
            assert ([row["id"] for row in listed[media_type.list_field]], listed["total"]) == (ids, total), query
        for query in ("limit=0", "offset=-1", "limit=x", "offset=99999999999999999999"):
            await expect_error(await api.request("ada", "GET", f"{media_type.path}?{query}"), 422, "VALIDATION_ERROR")


@BOTH
async def test_a_list_larger_than_the_memory_limit_is_complete(
    api: ApiClient, media_type: MediaType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_stream, "MEMORY_BYTES", 10_000)
    rows = [media_type.library_row(f"{WEIRD} {number}", number, number) for number in range(1, 401)]
    resources: dict[str, Any] = {media_type.resource: rows}
    async with stocked_service(api, media_type, **resources):
        response = await api.request("ada", "GET", media_type.path)
    assert [row["id"] for row in response.json()[media_type.list_field]] == [*range(1, 401)]
    assert int(response.headers["content-length"]) == len(response.content) > 10_000


# Adding


@BOTH
async def test_a_title_is_looked_up_and_other_fields_get_defaults(
    api: ApiClient, media_type: MediaType, published: list[events.Message]
) -> None:
    async with stocked_service(api, media_type) as arr:
        response = await api.request("ada", "POST", media_type.path, json={"title": "inception"})
        assert response.status_code == 201, response.text
        body, row = response.json(), arr.rows(media_type.resource)[-1]
        assert (body["id"], body["title"], body[media_type.external_id], body["qualityProfileId"]) == (
            3,
            "Inception",
            27205,
            1,
        )
        assert body["added"] == "2025-01-08T10:30:00Z"
        assert body["path"] == row["path"]
        assert (row["monitored"], row["rootFolderPath"]) == (True, arr.rows("rootfolder")[0]["path"])
        (post,) = [request for request in arr.requests if request.method == "POST"]
        options = json.loads(post.body)["addOptions"]
        if media_type is SHOWS:
            assert row["seasonFolder"] is True
            assert (options["monitor"], options["searchForMissingEpisodes"]) == ("all", False)
        else:
            assert row["minimumAvailability"] == "released"
            assert options == {"monitor": "movieOnly", "searchForMovie": False}
    (message,) = published
    assert (message["type"], message["rooms"]) == ("content.added", ["content_requests"])
    assert message["data"] == {
        "request_id": response.headers["x-request-id"],
        "content_id": "3",
        "title": "Inception",
        "type": media_type.resource,
    }
    assert message["timestamp"].endswith("Z")


async def test_documented_fields_are_passed_to_the_service(api: ApiClient) -> None:
    async with stocked_service(api, SHOWS, rootfolder=[root_folder(1, "/tv"), root_folder(2, "/anime/")]) as sonarr:
        body = {
            "title": "Whatever",
            "tvdb_id": 27205,
            "quality_profile_id": 4,
            "root_folder_path": "/anime",
            "monitored": False,
            "season_folder": False,
            "search_for_missing_episodes": True,
        }
        added = (await api.request("ada", "POST", "/api/v1/shows", json=body)).json()
        assert (added["title"], added["qualityProfileId"], added["monitored"]) == ("Inception", 4, False)
        sent = json.loads(sonarr.requests[-1].body)
        assert (sent["rootFolderPath"], sent["seasonFolder"]) == ("/anime/", False)
        assert sent["addOptions"] == {
            "monitor": "none",
            "searchForMissingEpisodes": True,
            "searchForCutoffUnmetEpisodes": False,
        }
    async with stocked_service(api, MOVIES) as radarr:
        body = {"title": "x", "tmdb_id": 27205, "search_for_movie": True, "minimum_availability": "inCinemas"}
        assert (await api.request("ada", "POST", "/api/v1/movies", json=body)).status_code == 201
        sent = json.loads(radarr.requests[-1].body)
        assert (sent["addOptions"]["searchForMovie"], sent["minimumAvailability"]) == (True, "inCinemas")


@BOTH
async def test_adding_an_existing_title_is_a_conflict(
    api: ApiClient, media_type: MediaType, published: list[events.Message]
) -> None:
    async with stocked_service(api, media_type) as arr:
        for body in ({"title": "Breaking Bad"}, {media_type.external_id_field: 81189}):
            response = await api.request("ada", "POST", media_type.path, json=body)
            assert "in sonarr already, with the id 1" in (await expect_error(response, 409, "ALREADY_THERE")).replace(
                "radarr", "sonarr"
            )
            assert response.json()["details"] == {"id": 1}
        assert len(arr.rows(media_type.resource)) == 2
        assert not [request for request in arr.requests if request.method == "POST"]
    assert published == []


@BOTH
async def test_simultaneous_requests_add_a_title_once(
    api: ApiClient, media_type: MediaType, published: list[events.Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    barrier, quality_profiles = asyncio.Barrier(5), capabilities_collection.quality_profiles

    async def wait_for_all(client: Client) -> list[capabilities_collection.QualityProfile]:
        """All five requests have looked the title up before the first of them adds it."""
        await barrier.wait()
        return await quality_profiles(client)

    monkeypatch.setattr(capabilities_collection, "quality_profiles", wait_for_all)
    async with stocked_service(api, media_type) as arr:
        body = {"title": "Inception"}
        async with asyncio.timeout(TIMEOUT):
            responses = await asyncio.gather(
                *(api.request("ada", "POST", media_type.path, json=body) for _ in range(5))
            )
        assert sorted(response.status_code for response in responses) == [201, 409, 409, 409, 409]
        assert {response.json()["details"]["id"] for response in responses if response.status_code == 409} == {3}
        assert len([request for request in arr.requests if request.method == "POST"]) == 5
        assert len(arr.rows(media_type.resource)) == 3
    assert len(published) == 1


@BOTH
async def test_a_title_added_despite_a_lost_response_is_found(api: ApiClient, media_type: MediaType) -> None:
    def before(request: StubRequest) -> StubResponse | None:
        if request.method != "POST":
            return None
        arr(request)
        return StubResponse(length=1)  # the response is cut off

    async with stocked_service(api, media_type, before) as arr:
        response = await api.request("ada", "POST", media_type.path, json={"title": "Inception"})
    assert (response.status_code, response.json()["details"]["id"]) == (409, 3), response.text


@BOTH
async def test_unknown_profiles_and_folders_are_refused_with_the_valid_choices(
    api: ApiClient, media_type: MediaType
) -> None:
    async with stocked_service(api, media_type) as arr:
        response = await api.request(
            "ada", "POST", media_type.path, json={"title": "Inception", "quality_profile_id": 99}
        )
        message = await expect_error(response, 400, "UNKNOWN_QUALITY_PROFILE")
        assert "1 (HD-1080p), 4 (Ultra-HD)" in message
        assert [choice["id"] for choice in response.json()["details"]["choices"]] == [1, 4]
        for path in ("/nowhere", "../tv", WEIRD):
            response = await api.request(
                "ada", "POST", media_type.path, json={"title": "Inception", "root_folder_path": path}
            )
            await expect_error(response, 400, "UNKNOWN_ROOT_FOLDER")
            assert response.json()["details"]["choices"] == [arr.rows("rootfolder")[0]["path"]]
        assert len(arr.rows(media_type.resource)) == 2
        for missing, code in (("qualityprofile", "UNKNOWN_QUALITY_PROFILE"), ("rootfolder", "UNKNOWN_ROOT_FOLDER")):
            before = arr.resources[missing]
            arr.resources[missing] = []
            message = await expect_error(
                await api.request("ada", "POST", media_type.path, json={"title": "Inception"}), 400, code
            )
            assert "create one there first" in message
            arr.resources[missing] = before


@BOTH
async def test_an_exact_match_wins_and_an_ambiguous_title_is_a_conflict(api: ApiClient, media_type: MediaType) -> None:
    async with stocked_service(api, media_type) as arr:
        names = [("Dune", 1, 1984), ("Dune", 2, 2021), ("Dune: Part Two", 3, 2024), ("Solo Dune Story", 4, 2020)]
        arr.lookup_results[:] = [media_type.lookup_row(title, number, year) for title, number, year in names]
        response = await api.request("ada", "POST", media_type.path, json={"title": "dune"})
        assert "Dune (1984)" in await expect_error(response, 409, "SEVERAL_FOUND")
        assert response.json()["details"]["choices"] == [
            {"title": "Dune", "year": 1984, media_type.external_id: 1},
            {"title": "Dune", "year": 2021, media_type.external_id: 2},
        ]
        await expect_error(
            await api.request("ada", "POST", media_type.path, json={"title": "un"}), 409, "SEVERAL_FOUND"
        )
        await expect_error(
            await api.request("ada", "POST", media_type.path, json={"title": "Arrakis"}), 404, "NOTHING_FOUND"
        )
        wrong_year = {"title": "Dune", "year": 2000}
        await expect_error(await api.request("ada", "POST", media_type.path, json=wrong_year), 404, "NOTHING_FOUND")
        await expect_error(
            await api.request("ada", "POST", media_type.path, json={media_type.external_id_field: 99}),
            404,
            "NOTHING_FOUND",
        )
        for body, number in (
            ({"title": "Dune", "year": 2021}, 2),
            ({"title": "Dune: Part Two"}, 3),
            ({"title": "Solo"}, 4),  # the only one that is found
        ):
            response = await api.request("ada", "POST", media_type.path, json=body)
            assert response.json()[media_type.external_id] == number, response.text


@BOTH
async def test_a_title_may_have_any_characters(api: ApiClient, media_type: MediaType) -> None:
    resources: dict[str, Any] = {media_type.resource: []}
    async with stocked_service(api, media_type, **resources) as arr:
        arr.lookup_results.append(media_type.lookup_row(WEIRD, 79126))
        body = (await api.request("ada", "POST", media_type.path, json={"title": WEIRD})).json()
        assert body["title"] == WEIRD
        assert [row["title"] for row in arr.rows(media_type.resource)] == [WEIRD]
        searched = (await api.request("ada", "POST", f"{media_type.path}1/search")).json()
        assert searched["message"] == f"Search triggered for {WEIRD}"


INVALID_BODIES: list[Any] = [
    {},
    {"title": ""},
    {"title": None},
    {"title": 201 * "x"},
    {"title": "x", "colour": "red"},
    {"title": "x", "quality_profile_id": "1"},
    {"title": "x", "quality_profile_id": 0},
    {"title": "x", "monitored": "yes"},
    {"title": "x", "year": 99999},
    {"OUTER": 0},
    {"OUTER": 2**31},
    {"OUTER": 10**30},
    {"OUTER": "81189"},
    {"OUTER": 1.5},
    [],
]


@BOTH
async def test_invalid_bodies_cause_no_request_to_the_service(api: ApiClient, media_type: MediaType) -> None:
    async with stocked_service(api, media_type) as arr:
        for body in INVALID_BODIES:
            content = json.dumps(body).replace("OUTER", media_type.external_id_field)
            await expect_error(
                await api.request("ada", "POST", media_type.path, content=content), 422, "VALIDATION_ERROR"
            )
        assert arr.requests == []


# Searching and deleting


@BOTH
async def test_a_search_is_a_command(api: ApiClient, media_type: MediaType) -> None:
    async with stocked_service(api, media_type, command=[{"id": 788, "name": "RssSync"}]) as arr:
        body = (await api.request("ada", "POST", f"{media_type.path}1/search")).json()
        assert body == {"success": True, "message": "Search triggered for Breaking Bad", "command_id": "cmd_789"}
        assert arr.commands == [media_type.search]


@BOTH
async def test_administrators_delete_with_or_without_files(api: ApiClient, media_type: MediaType) -> None:
    async with stocked_service(api, media_type) as arr:
        assert (await api.request("ada", "DELETE", f"{media_type.path}1")).status_code == 403
        assert len(arr.rows(media_type.resource)) == 2
        name = f"{media_type.resource}_id"
        for number, query, files in ((1, "", False), (2, "?delete_files=true", True)):
            body = (await api.request("admin", "DELETE", f"{media_type.path}{number}{query}")).json()
            message = f"{media_type.title} deleted successfully"
            assert body == {"success": True, "message": message, name: number, "files_deleted": files}
            assert arr.requests[-1].query == {"deleteFiles": str(files).lower()}
        assert arr.rows(media_type.resource) == []
        await expect_error(await api.request("admin", "DELETE", f"{media_type.path}1"), 404, "NOT_IN_COLLECTION")


@BOTH
async def test_invalid_and_unknown_ids_are_refused(api: ApiClient, media_type: MediaType) -> None:
    async with stocked_service(api, media_type) as arr:
        for identifier, status in (
            ("0", 422),
            ("-1", 422),
            ("99999999999", 422),
            ("x", 422),
            ("1%2F2", 404),
            ("7", 404),
        ):
            assert arr.requests == []
            for method, end in (("GET", ""), ("POST", "/search"), ("DELETE", "")):
                response = await api.request("admin", method, f"{media_type.path}{identifier}{end}")
                assert response.status_code == status, response.text
        assert "with the id 7" in response.json()["message"]
        assert {request.method for request in arr.requests} == {"GET"}
        assert len(arr.rows(media_type.resource)) == 2


# Selection of the service


@BOTH
async def test_without_a_service_the_error_explains_how_to_connect_one(api: ApiClient, media_type: MediaType) -> None:
    message = await expect_error(await api.request("ada", "GET", media_type.path), 503, "NO_SUCH_SERVICE_CONNECTED")
    assert "POST /api/services" in message
    assert media_type.service.title() in message
    await connect(api, media_type, "http://127.0.0.1:9", enabled=False)
    await expect_error(await api.request("ada", "GET", f"{media_type.path}1"), 503, "NO_SUCH_SERVICE_CONNECTED")


async def test_one_of_several_services_is_selected_by_name(api: ApiClient) -> None:
    async with stocked_service(api, SHOWS), fake_arr("sonarr", series=[library_series("Dune", 5, 1)]) as second:
        await connect(api, SHOWS, second.url, name="Sonarr 4K 🎬")
        async with stocked_service(api, MOVIES):
            titles = {
                name: (await api.request("ada", "GET", "/api/v1/shows/1", params={"service": name})).json().get("title")
                for name in ("sonarr", "SONARR", "Sonarr 4K 🎬")
            }
            assert titles == {"sonarr": "Breaking Bad", "SONARR": "Breaking Bad", "Sonarr 4K 🎬": "Dune"}
            wrong = await api.request("ada", "GET", "/api/v1/shows/", params={"service": "radarr"})
            await expect_error(wrong, 400, "SERVICE_CANNOT")
            unknown = await api.request("ada", "GET", "/api/v1/shows/", params={"service": "../x"})
            await expect_error(unknown, 404, "SERVICE_NOT_FOUND")


# Services that misbehave

UNREACHABLE, BAD, REFUSED = "SERVICE_UNREACHABLE", "SERVICE_BAD_RESPONSE", "REFUSED_BY_SERVICE"
MALFORMED_RESPONSES = [
    (html_page("Welcome"), BAD),
    (StubResponse(b""), BAD),
    (StubResponse(b'[{"id": 1, "title": "Brea'), BAD),
    (StubResponse(b'{"id": 1, "title": "Brea'), BAD),
    (StubResponse(b'[{"id": 1, "title": "Half"},', length=500), UNREACHABLE),
    (json_response({"error": "database is locked"}), BAD),
    (json_response(None), BAD),
    (json_response("no"), BAD),
    (json_response([None]), BAD),
    (json_response([{"title": "No id"}]), BAD),
    (json_response({"title": "No id"}), BAD),
    (json_response([{"id": "x", "title": "y"}]), BAD),
    (json_response({"id": 10**30, "title": "y"}), BAD),
    (json_response([{"id": 10**30, "title": "y"}]), BAD),
    (json_response([{"id": 1, "title": 3000 * "long "}]), BAD),
    (json_response([{"id": 1, "title": "y", "year": {"a": 1}, "seasons": 5, "ratings": [], "movieFile": 1}]), BAD),
    (json_response({"id": 1, "title": None}), BAD),
    (text_response("down", 503), UNREACHABLE),
    (json_response({"message": "sqlite is broken"}, 500), BAD),
    (json_response({"error": "Unauthorized"}, 401), "SERVICE_UNAUTHORIZED"),
]


@pytest.fixture
def no_circuit_breaker(api: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The circuit breaker stays closed, however often a service fails."""
    monkeypatch.setenv("FORGEARR_SERVICES__BREAKER_THRESHOLD", "1000")
    get_settings.cache_clear()


@BOTH
@pytest.mark.usefixtures("no_circuit_breaker")
async def test_every_malformed_response_is_a_clear_error(api: ApiClient, media_type: MediaType) -> None:
    reply = text_response("")
    async with stub_server(lambda request: reply) as server:
        await connect(api, media_type, server.url)
        for reply, code in MALFORMED_RESPONSES:
            responses = [
                await api.request("ada", "GET", media_type.path),
                await api.request("ada", "POST", media_type.path, json={"title": "x"}),
            ]
            if not reply.body.startswith(b"["):
                responses.append(await api.request("ada", "GET", f"{media_type.path}1"))
                responses.append(await api.request("ada", "POST", f"{media_type.path}1/search"))
            for response in responses:
                assert response.status_code == 503, (reply, response.text)
                assert response.json()["error_code"] in {code, BAD}
                assert media_type.service in response.json()["message"]
                assert len(response.json()["message"]) < 600
            assert responses[0].json()["error_code"] == code, (reply, responses[0].text)
            if b"locked" in reply.body:
                assert "database is locked" in responses[0].json()["message"]


@BOTH
@pytest.mark.usefixtures("no_circuit_breaker")
async def test_nothing_is_added_after_a_malformed_response(
    api: ApiClient, media_type: MediaType, published: list[events.Message]
) -> None:
    malformed: list[tuple[str, str, Any]] = []

    def before(request: StubRequest) -> StubResponse | None:
        method, end, content = malformed[-1]
        return json_response(content) if request.method == method and request.path.endswith(end) else None

    async with stocked_service(api, media_type, before) as arr:
        for method, end in (
            ("GET", "/lookup"),
            ("GET", f"/{media_type.resource}"),
            ("GET", "/qualityprofile"),
            ("GET", "/rootfolder"),
            ("POST", f"/{media_type.resource}"),
        ):
            for content in ({"error": "no"}, None, [None], [{"id": [], media_type.external_id: 27205}], 5):
                malformed.append((method, end, content))
                await expect_error(
                    await api.request("ada", "POST", media_type.path, json={"title": "Inception"}), 503, BAD
                )
        assert len(arr.rows(media_type.resource)) == 2
    assert published == []


@BOTH
async def test_a_row_removed_between_two_requests_is_a_clear_error(api: ApiClient, media_type: MediaType) -> None:
    """A title is deleted during a search or deletion of it; a root folder is removed during an addition."""

    def refuse_changes(request: StubRequest) -> StubResponse | None:
        is_change = request.method in {"POST", "DELETE"}
        return json_response([{"propertyName": "Path", "errorMessage": "It is gone"}], 400) if is_change else None

    async with stocked_service(api, media_type, refuse_changes) as arr:
        for method, path, body in (
            ("POST", f"{media_type.path}1/search", None),
            ("DELETE", f"{media_type.path}1", None),
            ("POST", media_type.path, {"title": "Inception"}),
        ):
            message = await expect_error(await api.request("admin", method, path, json=body), 400, REFUSED)
            assert "It is gone" in message
        assert len(arr.rows(media_type.resource)) == 2


@BOTH
async def test_malformed_responses_open_the_circuit_breaker_and_a_test_closes_it(
    api: ApiClient, media_type: MediaType
) -> None:
    broken = True
    async with stocked_service(
        api, media_type, lambda request: json_response([{"id": "x"}]) if broken else None
    ) as arr:
        for _ in range(5):
            await expect_error(await api.request("ada", "GET", media_type.path), 503, BAD)
        before = len(arr.requests)
        response = await api.request("ada", "GET", media_type.path)
        await expect_error(response, 503, "SERVICE_CIRCUIT_OPEN")
        assert int(response.headers["retry-after"]) > 0
        assert len(arr.requests) == before
        broken = False
        tested = await api.request("admin", "POST", "/api/services/1/test")
        assert tested.json()["success"], tested.text
        assert (await api.request("ada", "GET", media_type.path)).json()["total"] == 2
