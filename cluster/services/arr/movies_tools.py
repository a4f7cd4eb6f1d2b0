"""What a person or a model may have Radarr do."""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, Field

from cluster.services.arr.collection_tools import (
    SHARED,
    Adding,
    Days,
    Id,
    Listing,
    Term,
    adding,
    calendar,
    command,
    listing,
    looking_up,
    told,
)
from cluster.services.arr.movies import MOVIES, Availability, fields
from cluster.services.capabilities import collection as capabilities_collection
from cluster.services.capabilities.collection import Number, Title, command_name
from cluster.services.connector import Tool
from cluster.services.http.client import Client
from cluster.services.tools import Arguments


class OneMovie(Arguments):
    movie_id: Id = Field(description="Its id in Radarr.")


class Deleting(OneMovie):
    delete_files: bool = Field(default=False, description="Also its files.")


class AddingMovie(Adding):
    tmdb_id: Id | None = Field(default=None, description="Its id at TMDB.")
    search_for_movie: bool = Field(default=False, description="Search for it at once.")
    minimum_availability: Availability = Field(default="released", description="From when on to look for it.")

    @property
    def outer_id(self) -> int | None:
        return self.tmdb_id

    @property
    def fields(self) -> dict[str, object]:
        return fields(monitored=self.monitored, available=self.minimum_availability, search=self.search_for_movie)


class Release(BaseModel):
    """A movie that comes out."""

    title: Title
    year: Number | None = None
    inCinemas: datetime | None = None
    digitalRelease: datetime | None = None
    physicalRelease: datetime | None = None
    hasFile: bool | None = None


async def get_movie(client: Client, wanted: OneMovie) -> dict[str, Any]:
    return told(await capabilities_collection.get(client, MOVIES, wanted.movie_id))


async def search_for_movie(client: Client, wanted: OneMovie) -> dict[str, Any]:
    movie, number = await capabilities_collection.search(client, MOVIES, wanted.movie_id)
    return {"title": movie.title, "command_id": command_name(number)}


async def search_for_missing_movies(client: Client, wanted: Arguments) -> dict[str, Any]:
    return await command(client, {"name": "MissingMoviesSearch"})


async def delete_movie(client: Client, wanted: Deleting) -> dict[str, Any]:
    movie = await capabilities_collection.delete(client, MOVIES, wanted.movie_id, delete_files=wanted.delete_files)
    return {"deleted": movie.title, "files_deleted": wanted.delete_files}


async def get_calendar(client: Client, wanted: Days) -> list[dict[str, Any]]:
    releases = client.read(list[Release], await calendar(client, wanted))
    return [release.model_dump(mode="json", exclude_none=True) for release in releases]


TOOLS = (
    Tool("list_movies", "Which movies Radarr has.", Listing, listing(MOVIES, "movies")),
    Tool("get_movie", "All about one movie: whether it is there, and how good.", OneMovie, get_movie),
    Tool("search_movies", "Which movies could be added and are named like this.", Term, looking_up(MOVIES)),
    Tool("add_movie", "Add a movie, by its tmdb_id or by its title.", AddingMovie, adding(MOVIES), "change"),
    Tool("search_for_movie", "Search for a movie that is missing.", OneMovie, search_for_movie, "change"),
    Tool(
        "search_for_missing_movies",
        "Search for all monitored movies that are missing.",
        Arguments,
        search_for_missing_movies,
        "change",
    ),
    Tool("delete_movie", "Take a movie out of Radarr, with its files or without.", Deleting, delete_movie, "destroy"),
    Tool("get_calendar", "Which movies come out in the next days.", Days, get_calendar),
    *SHARED,
)
