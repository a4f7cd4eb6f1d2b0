"""The tools of Radarr."""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, Field

from cluster.services.arr.collection_tools import (
    SHARED_TOOLS,
    AddRequest,
    CalendarArguments,
    Id,
    ListArguments,
    LookupArguments,
    get_calendar_items,
    make_add,
    make_list,
    make_lookup,
    run_command,
    to_json,
)
from cluster.services.arr.movies import MOVIES, Availability, movie_fields
from cluster.services.capabilities import collection as capabilities_collection
from cluster.services.capabilities.collection import Number, Title, format_command_id
from cluster.services.http.client import Client
from cluster.tools import Arguments, Tool


class MovieArguments(Arguments):
    movie_id: Id = Field(description="Id of the movie in Radarr.")


class DeleteMovieArguments(MovieArguments):
    delete_files: bool = Field(default=False, description="Also delete its files.")


class AddMovieRequest(AddRequest):
    tmdb_id: Id | None = Field(default=None, description="Id of the movie at TMDB.")
    search_for_movie: bool = Field(default=False, description="Search for it at once.")
    minimum_availability: Availability = Field(default="released", description="When to begin to search for it.")

    @property
    def external_id(self) -> int | None:
        return self.tmdb_id

    @property
    def extra_fields(self) -> dict[str, object]:
        return movie_fields(monitored=self.monitored, available=self.minimum_availability, search=self.search_for_movie)


class Release(BaseModel):
    """A movie, with its release dates."""

    title: Title
    year: Number | None = None
    inCinemas: datetime | None = None
    digitalRelease: datetime | None = None
    physicalRelease: datetime | None = None
    hasFile: bool | None = None


async def get_movie(client: Client, arguments: MovieArguments) -> dict[str, Any]:
    return to_json(await capabilities_collection.get(client, MOVIES, arguments.movie_id))


async def search_for_movie(client: Client, arguments: MovieArguments) -> dict[str, Any]:
    movie, command_number = await capabilities_collection.search(client, MOVIES, arguments.movie_id)
    return {"title": movie.title, "command_id": format_command_id(command_number)}


async def search_for_missing_movies(client: Client, arguments: Arguments) -> dict[str, Any]:
    return await run_command(client, {"name": "MissingMoviesSearch"})


async def delete_movie(client: Client, arguments: DeleteMovieArguments) -> dict[str, Any]:
    movie = await capabilities_collection.delete(
        client, MOVIES, arguments.movie_id, delete_files=arguments.delete_files
    )
    return {"deleted": movie.title, "files_deleted": arguments.delete_files}


async def get_calendar(client: Client, arguments: CalendarArguments) -> list[dict[str, Any]]:
    releases = client.parse(list[Release], await get_calendar_items(client, arguments))
    return [release.model_dump(mode="json", exclude_none=True) for release in releases]


TOOLS = (
    Tool("list_movies", "List the movies in Radarr.", ListArguments, make_list(MOVIES, "movies")),
    Tool("get_movie", "Get all fields of a movie, with its file and its quality.", MovieArguments, get_movie),
    Tool("search_movies", "Look up movies by title, to add one.", LookupArguments, make_lookup(MOVIES)),
    Tool("add_movie", "Add a movie, by its tmdb_id or by its title.", AddMovieRequest, make_add(MOVIES), "change"),
    Tool("search_for_movie", "Search for releases of a missing movie.", MovieArguments, search_for_movie, "change"),
    Tool(
        "search_for_missing_movies",
        "Search for releases of all monitored movies that are missing.",
        Arguments,
        search_for_missing_movies,
        "change",
    ),
    Tool(
        "delete_movie",
        "Delete a movie from Radarr, with or without its files.",
        DeleteMovieArguments,
        delete_movie,
        "destroy",
    ),
    Tool("get_calendar", "List the movies that are released in the next days.", CalendarArguments, get_calendar),
    *SHARED_TOOLS,
)
