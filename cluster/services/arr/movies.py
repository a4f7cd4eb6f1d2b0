"""The collection of movies in Radarr, with its fields."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, model_validator

from cluster.services.capabilities.collection import API, Collection, CollectionItem, Number, Title

Availability = Literal["announced", "inCinemas", "released"]
RATING_SOURCES = ("tmdb", "imdb", "trakt", "metacritic", "rottenTomatoes")
"""The rating is taken from the first of these that has one."""


class Ratings(BaseModel):
    value: float | None = None
    votes: Number | None = None

    @model_validator(mode="before")
    @classmethod
    def select_source(cls, ratings: Any) -> Any:
        """Select one of the ratings. Older versions of Radarr have only one."""
        if not isinstance(ratings, dict) or "value" in ratings:
            return ratings
        return next((ratings[source] for source in RATING_SOURCES if ratings.get(source)), {})


class QualityName(BaseModel):
    name: Title | None = None


class Quality(BaseModel):
    quality: QualityName | None = None


class MovieFile(BaseModel):
    relativePath: Title | None = None
    size: Number | None = None
    quality: Quality | None = None


class Movie(CollectionItem):
    year: Number | None = None
    tmdbId: Number | None = None
    status: Title | None = None
    overview: str | None = None
    runtime: Number | None = None
    genres: list[Title] | None = None
    ratings: Ratings | None = None
    monitored: bool | None = None
    qualityProfileId: Number | None = None
    path: Title | None = None
    hasFile: bool | None = None
    sizeOnDisk: Number | None = None
    movieFile: MovieFile | None = None
    added: datetime | None = None


def movie_fields(*, monitored: bool, available: Availability, search: bool) -> dict[str, object]:
    """Return the fields of a movie to add that only Radarr has."""
    options = {"monitor": "movieOnly" if monitored else "none", "searchForMovie": search}
    return {"monitored": monitored, "minimumAvailability": available, "addOptions": options}


MOVIES = Collection(
    item_name="movie",
    description="collects movies",
    path=f"{API}/movie",
    item_type=Movie,
    external_id_field="tmdbId",
    lookup_prefix="tmdb",
    search_command=lambda movie_id: {"name": "MoviesSearch", "movieIds": [movie_id]},
)
