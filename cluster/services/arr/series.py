"""The collection of series in Sonarr, with its fields."""

from datetime import datetime

from pydantic import BaseModel

from cluster.services.capabilities.collection import API, Collection, CollectionItem, Number, Title


class Statistics(BaseModel):
    seasonCount: Number | None = None
    episodeCount: Number | None = None  # of those that are monitored and have aired
    episodeFileCount: Number | None = None
    percentOfEpisodes: float | None = None
    sizeOnDisk: Number | None = None


class Season(BaseModel):
    seasonNumber: Number
    monitored: bool | None = None
    statistics: Statistics | None = None


class Series(CollectionItem):
    tvdbId: Number | None = None
    status: Title | None = None
    overview: str | None = None
    network: Title | None = None
    year: Number | None = None
    seasons: list[Season] | None = None
    statistics: Statistics | None = None
    monitored: bool | None = None
    qualityProfileId: Number | None = None
    path: Title | None = None
    added: datetime | None = None

    @property
    def season_count(self) -> int | None:
        """The number of seasons, without season 0, which has the specials."""
        if self.statistics and self.statistics.seasonCount is not None:
            return self.statistics.seasonCount
        return None if self.seasons is None else sum(season.seasonNumber > 0 for season in self.seasons)


def series_fields(*, monitored: bool, season_folder: bool, search: bool) -> dict[str, object]:
    """Return the fields of a series to add that only Sonarr has."""
    episodes = "all" if monitored else "none"
    options = {"monitor": episodes, "searchForMissingEpisodes": search, "searchForCutoffUnmetEpisodes": False}
    return {"monitored": monitored, "seasonFolder": season_folder, "addOptions": options}


SERIES = Collection(
    item_name="series",
    description="collects series",
    path=f"{API}/series",
    item_type=Series,
    external_id_field="tvdbId",
    lookup_prefix="tvdb",
    search_command=lambda series_id: {"name": "SeriesSearch", "seriesId": series_id},
)
