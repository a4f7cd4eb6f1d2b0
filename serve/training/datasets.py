"""The routes /api/v1/datasets: uploaded training data. A dataset never changes; new content is a new version."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import select

from cluster.db import get_database
from cluster.ownership import visible
from cluster.times import UtcTime
from pipelines.training.data import content as data_content
from pipelines.training.data import datasets
from pipelines.training.data.content import SampleFile
from pipelines.training.data.datasets import NAME_PATTERN, Dataset
from pipelines.training.data.parsing import read_lines, read_samples
from serve.http.marks import streams_body
from serve.http.pagination import Page, PaginationParams
from serve.http.uploads import receive_body
from serve.security.callers import CurrentCaller
from serve.training.prompts import JSON_LINES, JSON_LINES_REQUEST, JSON_LINES_RESPONSES

router = APIRouter(prefix="/api/v1/datasets")

MAX_UPLOAD_BYTES = 512 * 1024 * 1024
CHUNK_BYTES = 256 * 1024

DatasetId = Annotated[str, Field(max_length=200)]


class DatasetView(BaseModel):
    id: str = Field(examples=["ds_0f3e5d0b6c1f4f0f9b7d6a5e4c3b2a19"])
    name: str
    version: int
    kind: Literal["chat", "preference"]
    digest: str = Field(description="SHA-256 of the content.")
    samples: int
    bytes: int
    source: dict[str, Any] = Field(description="The origin of the samples.")
    created_by: str
    created_at: UtcTime


@router.post(
    "",
    status_code=201,
    openapi_extra=JSON_LINES_REQUEST,
)
@streams_body
async def create_dataset(
    request: Request, caller: CurrentCaller, name: Annotated[str, Query(pattern=NAME_PATTERN)]
) -> DatasetView:
    """Upload samples as JSONL, one on each line: chats or preferences.

    If the name has a version with the same content already, that version is returned.
    """
    async with receive_body(request, MAX_UPLOAD_BYTES) as body:
        content = await asyncio.to_thread(_parse_upload, body)
        dataset = await datasets.store_dataset(get_database(), name, content, {"upload": name}, caller)
    return _view(dataset)


@router.get("")
async def list_datasets(
    caller: CurrentCaller,
    paging: PaginationParams,
    name: Annotated[Annotated[str, Field(max_length=100)] | SkipJsonSchema[None], Query()] = None,
) -> Page[DatasetView]:
    """List datasets, the newest first. Administrators see all datasets, others their own."""
    query = visible(select(Dataset), Dataset, caller)
    if name is not None:
        query = query.where(Dataset.name == name)
    async with get_database().read_transaction() as session:
        rows = await paging.read(session, query.order_by(Dataset.created_at.desc(), Dataset.id))
        return paging.page([_view(dataset) for dataset in rows.items], rows.total)


@router.get("/{dataset_id}")
async def show_dataset(dataset_id: DatasetId, caller: CurrentCaller) -> DatasetView:
    """Get a dataset by its id, or one of your own by NAME (the newest version) or NAME:v2."""
    async with get_database().read_transaction() as session:
        return _view(await datasets.find(session, dataset_id, caller))


@router.get(
    "/{dataset_id}/content",
    response_class=StreamingResponse,
    responses=JSON_LINES_RESPONSES,
)
async def read_dataset(dataset_id: DatasetId, caller: CurrentCaller) -> StreamingResponse:
    """Download the samples as JSONL."""
    async with get_database().read_transaction() as session:
        dataset = await datasets.find(session, dataset_id, caller)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="forgearr-dataset-"))
        path = await asyncio.to_thread(datasets.fetch, dataset, Path(folder))
        content = stack.enter_context(path.open("rb"))
        resources = stack.pop_all()

    async def chunks() -> AsyncIterator[bytes]:
        with resources:
            while chunk := await asyncio.to_thread(content.read, CHUNK_BYTES):
                yield chunk

    headers = {"Content-Length": str(dataset.bytes)}
    return StreamingResponse(chunks(), media_type=JSON_LINES, headers=headers)


@router.delete("/{dataset_id}", status_code=204)
async def delete_dataset(dataset_id: DatasetId, caller: CurrentCaller) -> None:
    """Delete one version by its id. Models that were trained with it stay."""
    await datasets.delete(get_database(), dataset_id, caller)


def _parse_upload(body: Path) -> SampleFile:
    with body.open("rb") as file:
        samples = read_samples(read_lines(file), "the upload")
        return data_content.write_samples(samples, body.with_name("samples.jsonl"), "the upload")


def _view(dataset: Dataset) -> DatasetView:
    return DatasetView.model_validate(dataset, from_attributes=True)
