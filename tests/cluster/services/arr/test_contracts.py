"""The requests to Sonarr and Radarr, validated by Prism against the official OpenAPI documents; and the tools, with
the documents' example responses."""

import json
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest

from cluster.services import health_checks
from cluster.services.capabilities.download_tracking import TrackingPosition
from cluster.services.catalog import find_connector
from cluster.services.http.client import Client
from cluster.services.http.connection import Connection
from tests.support.services import real_services
from tests.support.services.fake_arr import (
    LONG_AGO,
    FakeArr,
    fake_arr,
    library_movie,
    library_series,
    movie,
    queue_row,
    series,
)
from tests.support.services.fake_services import KEY
from tests.support.services.real_services import RunningService
from tests.support.services.stub_server import StubRequest
from tests.support.waiting import TIMEOUT

AGES_AGO = datetime.fromisoformat(LONG_AGO) - timedelta(hours=1)
HEADERS = {"X-Api-Key": KEY, "Accept": "application/json", "Content-Type": "application/json"}
ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "add_series": [{"tvdb_id": 81189}, {"title": "Dune", "monitored": False, "search_for_missing_episodes": True}],
    "add_movie": [{"tmdb_id": 603}, {"title": "Dune", "minimum_availability": "announced", "search_for_movie": True}],
    "get_series": [{"series_id": 1}],
    "get_movie": [{"movie_id": 1}],
    "search_for_series": [{"series_id": 1}],
    "search_for_movie": [{"movie_id": 1}],
    "search_series": [{"title": "Dune"}],
    "search_movies": [{"title": "Dune"}],
    "delete_series": [{"series_id": 1, "delete_files": True}],
    "delete_movie": [{"movie_id": 1, "delete_files": True}],
}


@pytest.fixture(scope="module", params=["sonarr", "radarr"])
def service(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def prism(service: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with real_services.prism(tmp_path_factory.mktemp("prism"), service) as running:
        yield running


@pytest.fixture(autouse=True)
def settings(home: object) -> None:
    """A client needs the setting of its timeout."""


async def call_all_tools(service: str, url: str, *effects: str) -> set[str]:
    """Call each tool with one of these effects, and return the names of the tools."""
    used: set[str] = set()
    async with Client(Connection("Ours", find_connector(service), url, KEY)).open() as client:
        for tool in sorted(find_connector(service).tools, key=lambda tool: tool.effect == "destroy"):
            if tool.effect in effects:
                for arguments in ARGUMENTS.get(tool.name, [{}]):
                    json.dumps(await tool.handler(client, tool.arguments.model_validate(arguments)))
                    used.add(tool.name)
    return used


def fill_library(arr: FakeArr) -> None:
    if arr.service == "sonarr":
        arr.add_row("series", library_series("The Wire", 79126, 1))
        arr.lookup_results += [series("Breaking Bad", 81189), series("Dune", 5)]
    else:
        arr.add_row("movie", library_movie("Metropolis", 19, 1))
        arr.lookup_results += [movie("The Matrix", 603), movie("Dune", 5)]
    arr.resources["calendar"] = []


@pytest.mark.deep
async def test_the_requests_of_tools_match_the_document(service: str, prism: RunningService) -> None:
    async with fake_arr(service) as arr:
        fill_library(arr)
        connector = find_connector(service)
        async with Client(Connection("Ours", connector, arr.url, KEY)).open() as client:
            await health_checks.get_version(client, connector)
        used = await call_all_tools(service, arr.url, "read", "change", "destroy")
        assert used == {tool.name for tool in find_connector(service).tools}
    assert {request.method for request in arr.requests} == {"GET", "POST", "DELETE"}
    await assert_valid(prism, arr.requests)


@pytest.mark.deep
async def test_the_requests_of_recovery_match_the_document(service: str, prism: RunningService) -> None:
    tracker = find_connector(service).download_tracker
    assert tracker
    assert tracker.replacement
    replacement, position = tracker.replacement, TrackingPosition(since=AGES_AGO, at=AGES_AGO)
    ids, content = (
        ({"seriesId": 1, "episodeId": 12}, ("series:1", "episode:12"))
        if service == "sonarr"
        else ({"movieId": 1}, ("movie:1",))
    )
    resources: dict[str, Any] = {"config/downloadclient": {"id": 1, "autoRedownloadFailed": False}}
    async with fake_arr(service, **resources) as arr:
        fill_library(arr)
        download = arr.add_row("queue", queue_row("Dune", 1, **ids))["downloadId"]
        grabbed = {"eventType": "grabbed", "downloadId": download, "sourceTitle": "Dune", "date": LONG_AGO, **ids}
        grab = arr.add_row("history", grabbed)["id"]
        async with Client(Connection("Ours", find_connector(service), arr.url, KEY)).open() as client:
            snapshot = await tracker.poll(client, position)
            assert ([active.id for active in snapshot.active], snapshot.finished) == ([download], ())
            assert await replacement.find(client, download) == snapshot.active[0]
            found_grab = await replacement.find_grab(client, download)
            assert found_grab
            assert (found_grab.id, found_grab.content, found_grab.failed) == (grab, content, False)
            await replacement.mark_failed(client, grab)
            (finished,) = (await tracker.poll(client, position)).finished
            assert (finished.id, finished.outcome, finished.content) == (download, "failed", content)
            assert not await replacement.searches_automatically(client)
            assert not await replacement.is_searching(client, content, AGES_AGO)
            await replacement.search(client, content)
            assert await replacement.is_searching(client, content, AGES_AGO)
            # The search is older than this.
            assert not await replacement.is_searching(client, content, AGES_AGO + timedelta(days=1))
            assert not await replacement.is_searching(client, tuple(f"{part}0" for part in content), AGES_AGO)
            assert await replacement.remove(client, download, False)
            assert not await replacement.remove(client, download, False)
            assert await replacement.find(client, download) is None
    await assert_valid(prism, arr.requests)


async def assert_valid(prism: RunningService, requests: Iterable[StubRequest]) -> None:
    async with httpx.AsyncClient(base_url=prism.url, headers=HEADERS, timeout=TIMEOUT) as http:
        for request in requests:
            response = await http.request(
                request.method, request.path, params=request.query, content=request.body or None
            )
            assert response.is_success, (
                f"{request.method} {request.path} {request.query} {request.body}: {response.text}"
            )


@pytest.mark.deep
async def test_prism_refuses_invalid_requests(service: str, prism: RunningService) -> None:
    connector = find_connector(service)
    assert connector.collection
    path, external_id = connector.collection.path, connector.collection.external_id_field
    async with httpx.AsyncClient(base_url=prism.url, headers=HEADERS, timeout=TIMEOUT) as http:
        assert (await http.get(path, params={external_id: "x"})).status_code == 422
        assert (await http.post("/api/v3/command", json={"name": 5})).status_code == 422
        assert (await http.get("/api/v3/nothing")).status_code == 404


async def test_the_fake_validates_bodies_that_prism_accepts(service: str) -> None:
    """The schema of a movie is recursive, and Prism does not validate such a body."""
    collection = find_connector(service).collection
    assert collection
    async with fake_arr(service) as arr:
        async with httpx.AsyncClient(base_url=arr.url, headers=HEADERS, timeout=TIMEOUT) as http:
            response = await http.post(collection.path, json={"title": "Dune", "colour": "red"})
            assert (response.status_code, "colour" in response.text) == (500, True)
        assert len(arr.violations) == 1
        arr.violations.clear()


@pytest.mark.deep
async def test_the_documents_example_responses_are_parsed(service: str, prism: RunningService) -> None:
    used = await call_all_tools(service, prism.url, "read")
    assert {"get_queue", "get_calendar", "get_quality_profiles", "get_root_folders"} < used
