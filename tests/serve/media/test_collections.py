"""/api/v1/shows and /api/v1/movies, on the whole application, with a Sonarr and a Radarr that have a memory."""

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
class Sort:
    """What tells shows from movies."""

    service: str
    path: str
    listed: str
    outer: str
    given: str
    word: str
    search: dict[str, Any]
    here: Callable[..., dict[str, Any]] = field(repr=False)
    out_there: Callable[..., dict[str, Any]] = field(repr=False)

    @property
    def things(self) -> str:
        return "series" if self.service == "sonarr" else "movie"


SHOWS = Sort(
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
MOVIES = Sort(
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
BOTH = pytest.mark.parametrize("sort", [SHOWS, MOVIES], ids=lambda sort: sort.service)


async def connect(api: ApiClient, sort: Sort, url: str, **more: Any) -> None:
    values = {"name": sort.service, "type": sort.service, "url": url, "api_key": KEY, **more}
    async with api.database.transaction() as session:
        await service_store.create(session, values, "ada")


@asynccontextmanager
async def stocked(
    api: ApiClient,
    sort: Sort,
    before: Callable[[StubRequest], StubResponse | None] = lambda request: None,
    **resources: Any,
) -> AsyncGenerator[FakeArr]:
    """A service with two things, which finds two more."""
    rows = [sort.here("Breaking Bad", 81189, 1), sort.here(WEIRD, 79126, 2)]
    async with fake_arr(sort.service, before, **{sort.things: rows, **resources}) as arr:
        arr.lookup_results += [sort.out_there("Breaking Bad", 81189), sort.out_there("Inception", 27205, 2010)]
        await connect(api, sort, arr.url)
        yield arr


async def failed(answer: httpx.Response, status: int, code: str) -> str:
    told = answer.json()
    assert (answer.status_code, told["error_code"]) == (status, code), answer.text
    return told["message"]


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[events.Message]:
    """What is published: here no actor passes it on."""
    messages: list[events.Message] = []
    monkeypatch.setattr(events, "publish", messages.extend)
    return messages


# Listing


async def test_shows_are_told_as_the_document_has_them(api: ApiClient) -> None:
    async with stocked(api, SHOWS):
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


async def test_movies_are_told_as_the_document_has_them(api: ApiClient) -> None:
    async with stocked(api, MOVIES) as radarr:
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
        # What is not known is null: a movie that nobody has, or rates, yet.
        radarr.add_row("movie", {"title": "New", "tmdbId": 5})
        told = (await api.request("ada", "GET", "/api/v1/movies/3")).json()
        assert (told["year"], told["ratings"], told["movieFile"], told["genres"]) == (None, None, None, None)


@BOTH
async def test_a_part_of_a_list(api: ApiClient, sort: Sort) -> None:
    rows = [sort.here(f"{'Star' if number % 2 else 'Moon'} {number}", number, number) for number in range(1, 8)]
    resources: dict[str, Any] = {sort.things: rows}
    async with stocked(api, sort, **resources):
        for query, ids, total in (
            ("limit=2", [1, 2], 7),
            ("limit=2&offset=5", [6, 7], 7),
            ("offset=7", [], 7),
            ("query=star", [1, 3, 5, 7], 4),
            ("query=STAR&offset=1&limit=2", [3, 5], 4),
            ("query=none", [], 0),
        ):
            listed = (await api.request("ada", "GET", f"{sort.path}?{query}")).json()
            assert ([row["id"] for row in listed[sort.listed]], listed["total"]) == (ids, total), query
        for query in ("limit=0", "offset=-1", "limit=x", "offset=99999999999999999999"):
            await failed(await api.request("ada", "GET", f"{sort.path}?{query}"), 422, "VALIDATION_ERROR")


@BOTH
async def test_a_list_longer_than_what_is_held(api: ApiClient, sort: Sort, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "MEMORY_BYTES", 10_000)
    rows = [sort.here(f"{WEIRD} {number}", number, number) for number in range(1, 401)]
    resources: dict[str, Any] = {sort.things: rows}
    async with stocked(api, sort, **resources):
        answer = await api.request("ada", "GET", sort.path)
    assert [row["id"] for row in answer.json()[sort.listed]] == [*range(1, 401)]
    assert int(answer.headers["content-length"]) == len(answer.content) > 10_000


# Adding


@BOTH
async def test_a_title_alone_is_looked_up_and_the_rest_chosen(
    api: ApiClient, sort: Sort, heard: list[events.Message]
) -> None:
    async with stocked(api, sort) as arr:
        answer = await api.request("ada", "POST", sort.path, json={"title": "inception"})
        assert answer.status_code == 201, answer.text
        told, kept = answer.json(), arr.rows(sort.things)[-1]
        assert (told["id"], told["title"], told[sort.outer], told["qualityProfileId"]) == (3, "Inception", 27205, 1)
        assert told["added"] == "2025-01-08T10:30:00Z"
        assert told["path"] == kept["path"]
        assert (kept["monitored"], kept["rootFolderPath"]) == (True, arr.rows("rootfolder")[0]["path"])
        (post,) = [request for request in arr.requests if request.method == "POST"]
        options = json.loads(post.body)["addOptions"]
        if sort is SHOWS:
            assert kept["seasonFolder"] is True
            assert (options["monitor"], options["searchForMissingEpisodes"]) == ("all", False)
        else:
            assert kept["minimumAvailability"] == "released"
            assert options == {"monitor": "movieOnly", "searchForMovie": False}
    (message,) = heard
    assert (message["type"], message["rooms"]) == ("content.added", ["content_requests"])
    assert message["data"] == {
        "request_id": answer.headers["x-request-id"],
        "content_id": "3",
        "title": "Inception",
        "type": sort.things,
    }
    assert message["timestamp"].endswith("Z")


async def test_what_the_document_sends_arrives(api: ApiClient) -> None:
    async with stocked(api, SHOWS, rootfolder=[root_folder(1, "/tv"), root_folder(2, "/anime/")]) as sonarr:
        wanted = {
            "title": "Whatever",
            "tvdb_id": 27205,
            "quality_profile_id": 4,
            "root_folder_path": "/anime",
            "monitored": False,
            "season_folder": False,
            "search_for_missing_episodes": True,
        }
        told = (await api.request("ada", "POST", "/api/v1/shows", json=wanted)).json()
        assert (told["title"], told["qualityProfileId"], told["monitored"]) == ("Inception", 4, False)
        sent = json.loads(sonarr.requests[-1].body)
        assert (sent["rootFolderPath"], sent["seasonFolder"]) == ("/anime/", False)
        assert sent["addOptions"] == {
            "monitor": "none",
            "searchForMissingEpisodes": True,
            "searchForCutoffUnmetEpisodes": False,
        }
    async with stocked(api, MOVIES) as radarr:
        wanted = {"title": "x", "tmdb_id": 27205, "search_for_movie": True, "minimum_availability": "inCinemas"}
        assert (await api.request("ada", "POST", "/api/v1/movies", json=wanted)).status_code == 201
        sent = json.loads(radarr.requests[-1].body)
        assert (sent["addOptions"]["searchForMovie"], sent["minimumAvailability"]) == (True, "inCinemas")


@BOTH
async def test_what_is_there_is_not_added_again(api: ApiClient, sort: Sort, heard: list[events.Message]) -> None:
    async with stocked(api, sort) as arr:
        for wanted in ({"title": "Breaking Bad"}, {sort.given: 81189}):
            answer = await api.request("ada", "POST", sort.path, json=wanted)
            assert "in sonarr already, with the id 1" in (await failed(answer, 409, "ALREADY_THERE")).replace(
                "radarr", "sonarr"
            )
            assert answer.json()["details"] == {"id": 1}
        assert len(arr.rows(sort.things)) == 2
        assert not [request for request in arr.requests if request.method == "POST"]
    assert heard == []


@BOTH
async def test_adding_twice_at_once_makes_one(
    api: ApiClient, sort: Sort, heard: list[events.Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, profiles = asyncio.Barrier(5), capabilities_collection.quality_profiles

    async def together(client: Client) -> list[capabilities_collection.QualityProfile]:
        """All five have looked, and found none, before the first of them adds."""
        await looked.wait()
        return await profiles(client)

    monkeypatch.setattr(capabilities_collection, "quality_profiles", together)
    async with stocked(api, sort) as arr:
        wanted = {"title": "Inception"}
        async with asyncio.timeout(TIMEOUT):
            answers = await asyncio.gather(*(api.request("ada", "POST", sort.path, json=wanted) for _ in range(5)))
        assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409, 409]
        assert {answer.json()["details"]["id"] for answer in answers if answer.status_code == 409} == {3}
        assert len([request for request in arr.requests if request.method == "POST"]) == 5
        assert len(arr.rows(sort.things)) == 3
    assert len(heard) == 1


@BOTH
async def test_what_was_added_by_a_request_without_an_answer_is_there(api: ApiClient, sort: Sort) -> None:
    def before(request: StubRequest) -> StubResponse | None:
        if request.method != "POST":
            return None
        arr(request)
        return StubResponse(length=1)  # it breaks off

    async with stocked(api, sort, before) as arr:
        answer = await api.request("ada", "POST", sort.path, json={"title": "Inception"})
    assert (answer.status_code, answer.json()["details"]["id"]) == (409, 3), answer.text


@BOTH
async def test_unknown_choices_are_refused_with_those_there_are(api: ApiClient, sort: Sort) -> None:
    async with stocked(api, sort) as arr:
        answer = await api.request("ada", "POST", sort.path, json={"title": "Inception", "quality_profile_id": 99})
        said = await failed(answer, 400, "UNKNOWN_QUALITY_PROFILE")
        assert "1 (HD-1080p), 4 (Ultra-HD)" in said
        assert [choice["id"] for choice in answer.json()["details"]["choices"]] == [1, 4]
        for path in ("/nowhere", "../tv", WEIRD):
            answer = await api.request("ada", "POST", sort.path, json={"title": "Inception", "root_folder_path": path})
            await failed(answer, 400, "UNKNOWN_ROOT_FOLDER")
            assert answer.json()["details"]["choices"] == [arr.rows("rootfolder")[0]["path"]]
        assert len(arr.rows(sort.things)) == 2
        for missing, code in (("qualityprofile", "UNKNOWN_QUALITY_PROFILE"), ("rootfolder", "UNKNOWN_ROOT_FOLDER")):
            before = arr.resources[missing]
            arr.resources[missing] = []
            said = await failed(await api.request("ada", "POST", sort.path, json={"title": "Inception"}), 400, code)
            assert "create one there first" in said
            arr.resources[missing] = before


@BOTH
async def test_the_exact_title_and_year_win_and_else_the_choices_are_told(api: ApiClient, sort: Sort) -> None:
    async with stocked(api, sort) as arr:
        names = [("Dune", 1, 1984), ("Dune", 2, 2021), ("Dune: Part Two", 3, 2024), ("Solo Dune Story", 4, 2020)]
        arr.lookup_results[:] = [sort.out_there(title, number, year) for title, number, year in names]
        answer = await api.request("ada", "POST", sort.path, json={"title": "dune"})
        assert "Dune (1984)" in await failed(answer, 409, "SEVERAL_FOUND")
        assert answer.json()["details"]["choices"] == [
            {"title": "Dune", "year": 1984, sort.outer: 1},
            {"title": "Dune", "year": 2021, sort.outer: 2},
        ]
        await failed(await api.request("ada", "POST", sort.path, json={"title": "un"}), 409, "SEVERAL_FOUND")
        await failed(await api.request("ada", "POST", sort.path, json={"title": "Arrakis"}), 404, "NOTHING_FOUND")
        wrong_year = {"title": "Dune", "year": 2000}
        await failed(await api.request("ada", "POST", sort.path, json=wrong_year), 404, "NOTHING_FOUND")
        await failed(await api.request("ada", "POST", sort.path, json={sort.given: 99}), 404, "NOTHING_FOUND")
        for wanted, number in (
            ({"title": "Dune", "year": 2021}, 2),
            ({"title": "Dune: Part Two"}, 3),
            ({"title": "Solo"}, 4),  # the only one that is found
        ):
            answer = await api.request("ada", "POST", sort.path, json=wanted)
            assert answer.json()[sort.outer] == number, answer.text


@BOTH
async def test_a_title_of_any_letters(api: ApiClient, sort: Sort) -> None:
    resources: dict[str, Any] = {sort.things: []}
    async with stocked(api, sort, **resources) as arr:
        arr.lookup_results.append(sort.out_there(WEIRD, 79126))
        told = (await api.request("ada", "POST", sort.path, json={"title": WEIRD})).json()
        assert told["title"] == WEIRD
        assert [row["title"] for row in arr.rows(sort.things)] == [WEIRD]
        searched = (await api.request("ada", "POST", f"{sort.path}1/search")).json()
        assert searched["message"] == f"Search triggered for {WEIRD}"


IMPOSSIBLE: list[Any] = [
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
async def test_what_cannot_be_wanted_is_not_even_asked_for(api: ApiClient, sort: Sort) -> None:
    async with stocked(api, sort) as arr:
        for body in IMPOSSIBLE:
            sent = json.dumps(body).replace("OUTER", sort.given)
            await failed(await api.request("ada", "POST", sort.path, content=sent), 422, "VALIDATION_ERROR")
        assert arr.requests == []


# Searching and deleting


@BOTH
async def test_a_search_is_a_command(api: ApiClient, sort: Sort) -> None:
    async with stocked(api, sort, command=[{"id": 788, "name": "RssSync"}]) as arr:
        told = (await api.request("ada", "POST", f"{sort.path}1/search")).json()
        assert told == {"success": True, "message": "Search triggered for Breaking Bad", "command_id": "cmd_789"}
        assert arr.commands == [sort.search]


@BOTH
async def test_administrators_delete_with_the_files_or_without(api: ApiClient, sort: Sort) -> None:
    async with stocked(api, sort) as arr:
        assert (await api.request("ada", "DELETE", f"{sort.path}1")).status_code == 403
        assert len(arr.rows(sort.things)) == 2
        name = f"{sort.things}_id"
        for number, query, files in ((1, "", False), (2, "?delete_files=true", True)):
            told = (await api.request("admin", "DELETE", f"{sort.path}{number}{query}")).json()
            message = f"{sort.word} deleted successfully"
            assert told == {"success": True, "message": message, name: number, "files_deleted": files}
            assert arr.requests[-1].query == {"deleteFiles": str(files).lower()}
        assert arr.rows(sort.things) == []
        await failed(await api.request("admin", "DELETE", f"{sort.path}1"), 404, "NOT_IN_COLLECTION")


@BOTH
async def test_an_id_that_is_none(api: ApiClient, sort: Sort) -> None:
    async with stocked(api, sort) as arr:
        for word, status in (("0", 422), ("-1", 422), ("99999999999", 422), ("x", 422), ("1%2F2", 404), ("7", 404)):
            assert arr.requests == []
            for method, end in (("GET", ""), ("POST", "/search"), ("DELETE", "")):
                answer = await api.request("admin", method, f"{sort.path}{word}{end}")
                assert answer.status_code == status, answer.text
        assert "with the id 7" in answer.json()["message"]
        assert {request.method for request in arr.requests} == {"GET"}
        assert len(arr.rows(sort.things)) == 2


# Which service


@BOTH
async def test_without_a_service_it_is_said_how_to_connect_one(api: ApiClient, sort: Sort) -> None:
    said = await failed(await api.request("ada", "GET", sort.path), 503, "NO_SUCH_SERVICE_CONNECTED")
    assert "POST /api/services" in said
    assert sort.service.title() in said
    await connect(api, sort, "http://127.0.0.1:9", enabled=False)
    await failed(await api.request("ada", "GET", f"{sort.path}1"), 503, "NO_SUCH_SERVICE_CONNECTED")


async def test_one_of_several_is_named(api: ApiClient) -> None:
    async with stocked(api, SHOWS), fake_arr("sonarr", series=[library_series("Dune", 5, 1)]) as second:
        await connect(api, SHOWS, second.url, name="Sonarr 4K 🎬")
        async with stocked(api, MOVIES):
            titles = {
                word: (await api.request("ada", "GET", "/api/v1/shows/1", params={"service": word})).json().get("title")
                for word in ("sonarr", "SONARR", "Sonarr 4K 🎬")
            }
            assert titles == {"sonarr": "Breaking Bad", "SONARR": "Breaking Bad", "Sonarr 4K 🎬": "Dune"}
            wrong = await api.request("ada", "GET", "/api/v1/shows/", params={"service": "radarr"})
            await failed(wrong, 400, "SERVICE_CANNOT")
            unknown = await api.request("ada", "GET", "/api/v1/shows/", params={"service": "../x"})
            await failed(unknown, 404, "SERVICE_NOT_FOUND")


# Services that do not do as they should

UNREACHABLE, BAD, REFUSED = "SERVICE_UNREACHABLE", "SERVICE_BAD_RESPONSE", "REFUSED_BY_SERVICE"
GARBLED = [
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
def patient(api: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """No circuit breaker opens, however often a service fails."""
    monkeypatch.setenv("FORGEARR_SERVICES__BREAKER_THRESHOLD", "1000")
    get_settings.cache_clear()


@BOTH
@pytest.mark.usefixtures("patient")
async def test_whatever_it_answers_it_is_a_clear_error(api: ApiClient, sort: Sort) -> None:
    reply = text_response("")
    async with stub_server(lambda request: reply) as server:
        await connect(api, sort, server.url)
        for reply, code in GARBLED:
            told = [
                await api.request("ada", "GET", sort.path),
                await api.request("ada", "POST", sort.path, json={"title": "x"}),
            ]
            if not reply.body.startswith(b"["):
                told.append(await api.request("ada", "GET", f"{sort.path}1"))
                told.append(await api.request("ada", "POST", f"{sort.path}1/search"))
            for answer in told:
                assert answer.status_code == 503, (reply, answer.text)
                assert answer.json()["error_code"] in {code, BAD}
                assert sort.service in answer.json()["message"]
                assert len(answer.json()["message"]) < 600
            assert told[0].json()["error_code"] == code, (reply, told[0].text)
            if b"locked" in reply.body:
                assert "database is locked" in told[0].json()["message"]


@BOTH
@pytest.mark.usefixtures("patient")
async def test_nothing_is_added_after_an_answer_that_makes_no_sense(
    api: ApiClient, sort: Sort, heard: list[events.Message]
) -> None:
    trouble: list[tuple[str, str, Any]] = []

    def before(request: StubRequest) -> StubResponse | None:
        method, end, garbled = trouble[-1]
        return json_response(garbled) if request.method == method and request.path.endswith(end) else None

    async with stocked(api, sort, before) as arr:
        for method, end in (
            ("GET", "/lookup"),
            ("GET", f"/{sort.things}"),
            ("GET", "/qualityprofile"),
            ("GET", "/rootfolder"),
            ("POST", f"/{sort.things}"),
        ):
            for garbled in ({"error": "no"}, None, [None], [{"id": [], sort.outer: 27205}], 5):
                trouble.append((method, end, garbled))
                await failed(await api.request("ada", "POST", sort.path, json={"title": "Inception"}), 503, BAD)
        assert len(arr.rows(sort.things)) == 2
    assert heard == []


@BOTH
async def test_what_goes_between_two_reads(api: ApiClient, sort: Sort) -> None:
    """A thing that is deleted while it is searched for or deleted; a folder that goes while something is added."""

    def gone(request: StubRequest) -> StubResponse | None:
        is_change = request.method in {"POST", "DELETE"}
        return json_response([{"propertyName": "Path", "errorMessage": "It is gone"}], 400) if is_change else None

    async with stocked(api, sort, gone) as arr:
        for method, path, body in (
            ("POST", f"{sort.path}1/search", None),
            ("DELETE", f"{sort.path}1", None),
            ("POST", sort.path, {"title": "Inception"}),
        ):
            said = await failed(await api.request("admin", method, path, json=body), 400, REFUSED)
            assert "It is gone" in said
        assert len(arr.rows(sort.things)) == 2


@BOTH
async def test_a_service_that_makes_no_sense_is_left_alone_and_found_again(api: ApiClient, sort: Sort) -> None:
    broken = True
    async with stocked(api, sort, lambda request: json_response([{"id": "x"}]) if broken else None) as arr:
        for _ in range(5):
            await failed(await api.request("ada", "GET", sort.path), 503, BAD)
        before = len(arr.requests)
        answer = await api.request("ada", "GET", sort.path)
        await failed(answer, 503, "SERVICE_CIRCUIT_OPEN")
        assert int(answer.headers["retry-after"]) > 0
        assert len(arr.requests) == before
        broken = False
        tested = await api.request("admin", "POST", "/api/services/1/test")
        assert tested.json()["success"], tested.text
        assert (await api.request("ada", "GET", sort.path)).json()["total"] == 2
