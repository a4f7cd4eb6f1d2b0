"""The routes /api/v1/movies: the movies in Radarr."""

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import StreamingResponse

from cluster import audit_log
from cluster.services.arr.movies import MOVIES
from cluster.services.arr.movies_tools import AddMovieRequest
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

router = APIRouter(prefix="/api/v1/movies")


class MovieRow(BaseModel):
    id: int
    title: str
    year: int | None
    tmdbId: int | None
    status: str | None
    overview: str | None
    runtime: int | None
    monitored: bool | None
    qualityProfileId: int | None
    path: str | None
    hasFile: bool | None
    sizeOnDisk: int | None


class MovieList(BaseModel):
    movies: list[MovieRow]
    total: int


class Ratings(BaseModel):
    value: float | None
    votes: int | None


class QualityName(BaseModel):
    name: str | None


class Quality(BaseModel):
    quality: QualityName | None


class MovieFile(BaseModel):
    relativePath: str | None
    size: int | None
    quality: Quality | None


class MovieView(MovieRow):
    genres: list[str] | None
    ratings: Ratings | None
    movieFile: MovieFile | None


class MovieAdded(BaseModel):
    id: int
    title: str
    year: int | None
    tmdbId: int | None
    added: UtcTime | None
    qualityProfileId: int | None
    path: str | None
    monitored: bool | None


class MovieDeleted(BaseModel):
    success: bool = True
    message: str = "Movie deleted successfully"
    movie_id: int
    files_deleted: bool


@router.get("", include_in_schema=False)
@router.get("/", response_class=StreamingResponse, responses={200: {"model": MovieList}})
async def list_movies(
    caller: CurrentCaller, params: CollectionParams, service: ServiceName = None
) -> StreamingResponse:
    """List all movies, or a part of them."""
    async with collection_client(MOVIES, service) as client:
        return await spooled_list_response(
            "movies",
            lambda add: capabilities_collection.for_each_item(
                client,
                MOVIES,
                lambda movie: add(MovieRow.model_validate(movie, from_attributes=True)),
                query=params.query,
                offset=params.offset,
                limit=params.limit,
            ),
        )


@router.post("", include_in_schema=False, status_code=201)
@router.post("/", status_code=201)
@rate_limit("content")
async def add_movie(body: AddMovieRequest, caller: CurrentCaller, service: ServiceName = None) -> MovieAdded:
    """Add a movie by its `tmdb_id`, or by its title, which Radarr looks up."""
    async with collection_client(MOVIES, service) as client:
        movie = await capabilities_collection.add(client, MOVIES, body.item_to_add)
    publish_added(MOVIES, movie)
    return MovieAdded.model_validate(movie, from_attributes=True)


@router.get("/{movie_id}")
async def show_movie(movie_id: CollectionItemId, caller: CurrentCaller, service: ServiceName = None) -> MovieView:
    async with collection_client(MOVIES, service) as client:
        return MovieView.model_validate(
            await capabilities_collection.get(client, MOVIES, movie_id), from_attributes=True
        )


@router.post("/{movie_id}/search")
@rate_limit("content")
async def search_for_movie(
    movie_id: CollectionItemId, caller: CurrentCaller, service: ServiceName = None
) -> SearchStarted:
    """Start a search for a movie in Radarr."""
    async with collection_client(MOVIES, service) as client:
        movie, command = await capabilities_collection.search(client, MOVIES, movie_id)
    return SearchStarted(
        message=f"Search triggered for {movie.title}", command_id=capabilities_collection.format_command_id(command)
    )


@router.delete("/{movie_id}")
async def delete_movie(
    movie_id: CollectionItemId, caller: AdminCaller, delete_files: DeleteFiles = False, service: ServiceName = None
) -> MovieDeleted:
    async with collection_client(MOVIES, service) as client:
        await capabilities_collection.delete(client, MOVIES, movie_id, delete_files=delete_files)
    await audit_log.record_alone(
        "movie.delete", caller, str(movie_id), service=client.connection.name, files=delete_files
    )
    return MovieDeleted(movie_id=movie_id, files_deleted=delete_files)
