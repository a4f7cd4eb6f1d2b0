"""What a person or a model may have Sonarr do."""

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
from cluster.services.arr.series import SERIES, fields
from cluster.services.capabilities import collection as capabilities_collection
from cluster.services.capabilities.collection import Number, Title, command_name
from cluster.services.connector import Tool
from cluster.services.http.client import Client
from cluster.services.tools import Arguments


class OneSeries(Arguments):
    series_id: Id = Field(description="Its id in Sonarr.")


class Deleting(OneSeries):
    delete_files: bool = Field(default=False, description="Also its files.")


class AddingSeries(Adding):
    tvdb_id: Id | None = Field(default=None, description="Its id at TheTVDB.")
    season_folder: bool = Field(default=True, description="Whether each season has a folder.")
    search_for_missing_episodes: bool = Field(default=False, description="Search for all that is missing at once.")

    @property
    def outer_id(self) -> int | None:
        return self.tvdb_id

    @property
    def fields(self) -> dict[str, object]:
        return fields(
            monitored=self.monitored, season_folder=self.season_folder, search=self.search_for_missing_episodes
        )


class SeriesTitle(BaseModel):
    title: Title


class Episode(BaseModel):
    """One that airs."""

    title: Title | None = None
    seasonNumber: Number | None = None
    episodeNumber: Number | None = None
    airDateUtc: datetime | None = None
    hasFile: bool | None = None
    series: SeriesTitle | None = None


async def get_series(client: Client, wanted: OneSeries) -> dict[str, Any]:
    return told(await capabilities_collection.get(client, SERIES, wanted.series_id))


async def search_for_series(client: Client, wanted: OneSeries) -> dict[str, Any]:
    series, number = await capabilities_collection.search(client, SERIES, wanted.series_id)
    return {"title": series.title, "command_id": command_name(number)}


async def search_for_missing_episodes(client: Client, wanted: Arguments) -> dict[str, Any]:
    return await command(client, {"name": "MissingEpisodeSearch"})


async def delete_series(client: Client, wanted: Deleting) -> dict[str, Any]:
    series = await capabilities_collection.delete(client, SERIES, wanted.series_id, delete_files=wanted.delete_files)
    return {"deleted": series.title, "files_deleted": wanted.delete_files}


async def get_calendar(client: Client, wanted: Days) -> list[dict[str, Any]]:
    episodes = client.read(list[Episode], await calendar(client, wanted, includeSeries=True))
    return [episode.model_dump(mode="json", exclude_none=True) for episode in episodes]


TOOLS = (
    Tool("list_series", "Which series Sonarr has.", Listing, listing(SERIES, "series")),
    Tool("get_series", "All about one series: its seasons, its episodes, how much is there.", OneSeries, get_series),
    Tool("search_series", "Which series could be added and are named like this.", Term, looking_up(SERIES)),
    Tool("add_series", "Add a series, by its tvdb_id or by its title.", AddingSeries, adding(SERIES), "change"),
    Tool("search_for_series", "Search for what is missing of a series.", OneSeries, search_for_series, "change"),
    Tool(
        "search_for_missing_episodes",
        "Search for all monitored episodes that are missing.",
        Arguments,
        search_for_missing_episodes,
        "change",
    ),
    Tool(
        "delete_series", "Take a series out of Sonarr, with its files or without.", Deleting, delete_series, "destroy"
    ),
    Tool("get_calendar", "Which episodes air in the next days.", Days, get_calendar),
    *SHARED,
)
