"""The routes /api/v1/shows: the series in Sonarr."""

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import StreamingResponse

from cluster import audit_log
from cluster.services.arr.series import SERIES, Series
from cluster.services.arr.series_tools import AddSeriesRequest
from cluster.services.capabilities import collection as capabilities_collection
from cluster.times import UtcTime
from serve.http.json_stream import spooled_list_response
from serve.http.marks import rate_limit
from serve.media.collections import (
    CollectionItemId,
    CollectionParams,
    DeleteFiles,
    SearchStarted,
    collection_client,
    publish_added,
)
from serve.media.dependencies import ServiceName
from serve.security.callers import AdminCaller, CurrentCaller

router = APIRouter(prefix="/api/v1/shows")


class SeriesRow(BaseModel):
    id: int
    title: str
    tvdbId: int | None
    status: str | None
    overview: str | None
    network: str | None
    year: int | None
    seasons: int | None
    episodeCount: int | None
    monitored: bool | None
    qualityProfileId: int | None
    path: str | None


class SeriesList(BaseModel):
    series: list[SeriesRow]
    total: int


class SeasonStatistics(BaseModel):
    episodeCount: int | None
    episodeFileCount: int | None
    percentOfEpisodes: float | None


class SeasonView(BaseModel):
    seasonNumber: int
    monitored: bool | None
    statistics: SeasonStatistics | None


class SeriesView(BaseModel):
    id: int
    title: str
    tvdbId: int | None
    status: str | None
    overview: str | None
    network: str | None
    year: int | None
    seasons: list[SeasonView] | None
    qualityProfileId: int | None
    path: str | None
    monitored: bool | None
    sizeOnDisk: int | None


class SeriesAdded(BaseModel):
    id: int
    title: str
    tvdbId: int | None
    added: UtcTime | None
    qualityProfileId: int | None
    path: str | None
    monitored: bool | None


class SeriesDeleted(BaseModel):
    success: bool = True
    message: str = "Series deleted successfully"
    series_id: int
    files_deleted: bool


@router.get("", include_in_schema=False)
@router.get("/", response_class=StreamingResponse, responses={200: {"model": SeriesList}})
async def list_shows(caller: CurrentCaller, params: CollectionParams, service: ServiceName = None) -> StreamingResponse:
    """List all series, or a part of them."""
    async with collection_client(SERIES, service) as client:
        return await spooled_list_response(
            "series",
            lambda add: capabilities_collection.for_each_item(
                client,
                SERIES,
                lambda series: add(_row(series)),
                query=params.query,
                offset=params.offset,
                limit=params.limit,
            ),
        )


@router.post("", include_in_schema=False, status_code=201)
@router.post("/", status_code=201)
@rate_limit("content")
async def add_show(body: AddSeriesRequest, caller: CurrentCaller, service: ServiceName = None) -> SeriesAdded:
    """Add a series by its `tvdb_id`, or by its title, which Sonarr looks up."""
    async with collection_client(SERIES, service) as client:
        series = await capabilities_collection.add(client, SERIES, body.item_to_add)
    publish_added(SERIES, series)
    return SeriesAdded.model_validate(series, from_attributes=True)


@router.get("/{series_id}")
async def show_series(series_id: CollectionItemId, caller: CurrentCaller, service: ServiceName = None) -> SeriesView:
    async with collection_client(SERIES, service) as client:
        series = await capabilities_collection.get(client, SERIES, series_id)
    fields = {name: getattr(series, name) for name in SeriesView.model_fields if name != "sizeOnDisk"}
    size = series.statistics and series.statistics.sizeOnDisk
    return SeriesView.model_validate({**fields, "sizeOnDisk": size}, from_attributes=True)


@router.post("/{series_id}/search")
@rate_limit("content")
async def search_for_series(
    series_id: CollectionItemId, caller: CurrentCaller, service: ServiceName = None
) -> SearchStarted:
    """Start a search for missing episodes in Sonarr."""
    async with collection_client(SERIES, service) as client:
        series, command = await capabilities_collection.search(client, SERIES, series_id)
    return SearchStarted(
        message=f"Search triggered for {series.title}", command_id=capabilities_collection.format_command_id(command)
    )


@router.delete("/{series_id}")
async def delete_series(
    series_id: CollectionItemId, caller: AdminCaller, delete_files: DeleteFiles = False, service: ServiceName = None
) -> SeriesDeleted:
    async with collection_client(SERIES, service) as client:
        await capabilities_collection.delete(client, SERIES, series_id, delete_files=delete_files)
    await audit_log.record_alone(
        "series.delete", caller, str(series_id), service=client.connection.name, files=delete_files
    )
    return SeriesDeleted(series_id=series_id, files_deleted=delete_files)


def _row(series: Series) -> SeriesRow:
    count = series.statistics and series.statistics.episodeCount
    computed = {"seasons", "episodeCount"}
    fields = {name: getattr(series, name) for name in SeriesRow.model_fields.keys() - computed}
    return SeriesRow(**fields, seasons=series.season_count, episodeCount=count)
