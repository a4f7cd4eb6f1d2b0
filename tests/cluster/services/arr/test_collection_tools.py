"""The tools of Sonarr and Radarr, with stateful fakes."""

from typing import Any

import pytest
from pydantic import ValidationError

from cluster.services.capabilities.collection import AlreadyInCollection, NotInCollection
from cluster.services.catalog import all_connectors, find_connector
from cluster.services.http.client import Client
from cluster.services.http.connection import Connection
from cluster.tools import Tool
from tests.support.services.fake_arr import FakeArr, fake_arr, library_movie, library_series, movie, queue_row
from tests.support.services.fake_services import KEY


@pytest.fixture(autouse=True)
def settings(home: object) -> None:
    """A client needs the setting of its timeout."""


def tools_of(service: str) -> dict[str, Tool[Client]]:
    return {tool.name: tool for tool in find_connector(service).tools}


async def call_tool(arr: FakeArr, name: str, **arguments: Any) -> Any:
    tool = tools_of(arr.service)[name]
    async with Client(Connection("Ours", find_connector(arr.service), arr.url, KEY)).open() as client:
        return await tool.handler(client, tool.arguments.model_validate(arguments))


def test_tools_declare_their_effects() -> None:
    effects = {name: tool.effect for service in ("sonarr", "radarr") for name, tool in tools_of(service).items()}
    assert {name for name, effect in effects.items() if effect == "destroy"} == {"delete_series", "delete_movie"}
    changing = {name for name, effect in effects.items() if effect == "change"}
    assert {name.partition("_for_")[0].partition("_")[0] for name in changing} == {"add", "search"}
    for connector in all_connectors().values():
        names = [tool.name for tool in connector.tools]
        assert len(names) == len(set(names))


async def test_a_list_is_paginated() -> None:
    async with fake_arr("radarr", movie=[library_movie(f"Movie {n}", n, n) for n in range(1, 70)]) as radarr:
        result = await call_tool(radarr, "list_movies")
        assert (len(result["movies"]), result["total"]) == (50, 69)
        result = await call_tool(radarr, "list_movies", query="movie 6", limit=2, offset=1)
        assert ([row["id"] for row in result["movies"]], result["total"]) == ([60, 61], 11)
        with pytest.raises(ValidationError):
            await call_tool(radarr, "list_movies", limit=100_000)


async def test_a_movie_is_looked_up_added_searched_for_and_deleted() -> None:
    async with fake_arr("radarr", calendar=[movie("Dune", 438631, 2021, hasFile=False)]) as radarr:
        radarr.lookup_results += [movie("The Matrix", 603), movie("The Matrix Reloaded", 604, 2003)]
        assert await call_tool(radarr, "search_movies", title="matrix") == [
            {"title": "The Matrix", "year": 1999, "tmdbId": 603},
            {"title": "The Matrix Reloaded", "year": 2003, "tmdbId": 604},
        ]
        assert (await call_tool(radarr, "add_movie", title="the matrix"))["id"] == 1
        with pytest.raises(AlreadyInCollection):
            await call_tool(radarr, "add_movie", tmdb_id=603)
        assert (await call_tool(radarr, "search_for_movie", movie_id=1))["title"] == "The Matrix"
        assert await call_tool(radarr, "search_for_missing_movies") == {"command_id": "cmd_2"}
        assert [command["name"] for command in radarr.commands] == ["MoviesSearch", "MissingMoviesSearch"]
        assert await call_tool(radarr, "get_calendar") == [{"title": "Dune", "year": 2021, "hasFile": False}]
        assert await call_tool(radarr, "delete_movie", movie_id=1) == {"deleted": "The Matrix", "files_deleted": False}
        with pytest.raises(NotInCollection):
            await call_tool(radarr, "get_movie", movie_id=1)


async def test_the_queue_calendar_and_library_of_sonarr() -> None:
    stored, summary = library_series("Dune: Prophecy", 367118, 1), {"title": "Dune: Prophecy"}
    airing = {"id": 1, "title": "High-Handed Enemy", "seasonNumber": 1, "episodeNumber": 6, "series": stored}
    waiting = queue_row("Dune.S01E06", 5, seriesId=1, episodeId=1)
    async with fake_arr("sonarr", series=[stored], queue=[waiting], calendar=[airing]) as sonarr:
        result = await call_tool(sonarr, "get_queue")
        assert (result["total"], result["queue"][0]["id"], result["queue"][0]["sizeleft"]) == (1, 5, 1e9)
        (episode,) = await call_tool(sonarr, "get_calendar", days=30)
        assert episode == {"title": "High-Handed Enemy", "seasonNumber": 1, "episodeNumber": 6, "series": summary}
        assert (await call_tool(sonarr, "get_series", series_id=1))["statistics"]["episodeCount"] == 7
        assert [profile["name"] for profile in await call_tool(sonarr, "get_quality_profiles")] == [
            "HD-1080p",
            "Ultra-HD",
        ]
        assert [folder["path"] for folder in await call_tool(sonarr, "get_root_folders")] == ["/tv"]
