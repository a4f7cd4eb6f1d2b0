"""The tools of Sonarr."""

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
from cluster.services.arr.series import SERIES, series_fields
from cluster.services.capabilities import collection as capabilities_collection
from cluster.services.capabilities.collection import Number, Title, format_command_id
from cluster.services.http.client import Client
from cluster.tools import Arguments, Tool


class SeriesArguments(Arguments):
    series_id: Id = Field(description="Id of the series in Sonarr.")


class DeleteSeriesArguments(SeriesArguments):
    delete_files: bool = Field(default=False, description="Also delete its files.")


class AddSeriesRequest(AddRequest):
    tvdb_id: Id | None = Field(default=None, description="Id of the series at TheTVDB.")
    season_folder: bool = Field(default=True, description="Whether each season has a folder.")
    search_for_missing_episodes: bool = Field(default=False, description="Search for its episodes at once.")

    @property
    def external_id(self) -> int | None:
        return self.tvdb_id

    @property
    def extra_fields(self) -> dict[str, object]:
        return series_fields(
            monitored=self.monitored, season_folder=self.season_folder, search=self.search_for_missing_episodes
        )


class SeriesTitle(BaseModel):
    title: Title


class Episode(BaseModel):
    """An episode, with its air date."""

    title: Title | None = None
    seasonNumber: Number | None = None
    episodeNumber: Number | None = None
    airDateUtc: datetime | None = None
    hasFile: bool | None = None
    series: SeriesTitle | None = None


async def get_series(client: Client, arguments: SeriesArguments) -> dict[str, Any]:
    return to_json(await capabilities_collection.get(client, SERIES, arguments.series_id))


async def search_for_series(client: Client, arguments: SeriesArguments) -> dict[str, Any]:
    series, command_number = await capabilities_collection.search(client, SERIES, arguments.series_id)
    return {"title": series.title, "command_id": format_command_id(command_number)}


async def search_for_missing_episodes(client: Client, arguments: Arguments) -> dict[str, Any]:
    return await run_command(client, {"name": "MissingEpisodeSearch"})


async def delete_series(client: Client, arguments: DeleteSeriesArguments) -> dict[str, Any]:
    series = await capabilities_collection.delete(
        client, SERIES, arguments.series_id, delete_files=arguments.delete_files
    )
    return {"deleted": series.title, "files_deleted": arguments.delete_files}


async def get_calendar(client: Client, arguments: CalendarArguments) -> list[dict[str, Any]]:
    episodes = client.parse(list[Episode], await get_calendar_items(client, arguments, includeSeries=True))
    return [episode.model_dump(mode="json", exclude_none=True) for episode in episodes]


TOOLS = (
    Tool("list_series", "List the series in Sonarr.", ListArguments, make_list(SERIES, "series")),
    Tool("get_series", "Get all fields of a series, with its seasons and statistics.", SeriesArguments, get_series),
    Tool("search_series", "Look up series by title, to add one.", LookupArguments, make_lookup(SERIES)),
    Tool("add_series", "Add a series, by its tvdb_id or by its title.", AddSeriesRequest, make_add(SERIES), "change"),
    Tool(
        "search_for_series",
        "Search for releases of a series' missing episodes.",
        SeriesArguments,
        search_for_series,
        "change",
    ),
    Tool(
        "search_for_missing_episodes",
        "Search for releases of all monitored episodes that are missing.",
        Arguments,
        search_for_missing_episodes,
        "change",
    ),
    Tool(
        "delete_series",
        "Delete a series from Sonarr, with or without its files.",
        DeleteSeriesArguments,
        delete_series,
        "destroy",
    ),
    Tool("get_calendar", "List the episodes that air in the next days.", CalendarArguments, get_calendar),
    *SHARED_TOOLS,
)
