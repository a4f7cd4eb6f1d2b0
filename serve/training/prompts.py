"""The routes /api/training/prompts: training prompts, which people write and edit one by one."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path as FilePath
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import get_database
from cluster.ownership import Principal, visible
from cluster.times import UtcTime
from pipelines.training.data import prompts
from pipelines.training.data.messages import Message, Tool, ToolCall
from pipelines.training.data.parsing import EmptyData, read_lines
from pipelines.training.data.prompts import MAX_ID, PAGE_SIZE, Input, Name, Prompt, PromptRequest, Tags
from serve.http.errors import Responses
from serve.http.pagination import Page, PaginationParams
from serve.http.uploads import receive_body
from serve.security.callers import CurrentCaller

router = APIRouter(prefix="/api/training/prompts")

MAX_IMPORT_BYTES = 32 * 1024 * 1024
JSON_LINES = "application/x-ndjson"
JSON_LINES_CONTENT: dict[str, Any] = {"schema": {"type": "string"}}
JSON_LINES_REQUEST = {
    "requestBody": {"required": True, "content": {JSON_LINES: JSON_LINES_CONTENT, "text/plain": JSON_LINES_CONTENT}}
}
JSON_LINES_RESPONSES: Responses = {200: {"description": "JSON Lines", "content": {JSON_LINES: JSON_LINES_CONTENT}}}

PromptId = Annotated[int, Path(ge=1, le=MAX_ID)]
ShortText = Annotated[str, Field(max_length=100)]
CategoryFilter = Annotated[ShortText | SkipJsonSchema[None], Query()]
TagFilter = Annotated[ShortText | SkipJsonSchema[None], Query(description="Prompts with this tag.")]
SearchFilter = Annotated[
    ShortText | SkipJsonSchema[None],
    Query(description="Prompts with this text in their name, input or expected output."),
]


class PromptView(BaseModel):
    id: int
    name: str
    category: str | None
    system_prompt: str | None
    user_input: str
    expected_output: str | None
    tags: list[str]
    tools: list[Tool] | None
    messages: list[Message] | None
    tool_calls: list[ToolCall] | None
    created_by: str
    created_at: UtcTime
    updated_at: UtcTime


class PromptChanges(BaseModel):
    """Changes to a prompt. Fields that are not sent stay unchanged."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Name | SkipJsonSchema[None] = None
    category: str | None = Field(default=None, min_length=1, max_length=100)
    system_prompt: str | None = Field(default=None, max_length=1_000_000)
    user_input: Input | SkipJsonSchema[None] = None
    expected_output: str | None = Field(default=None, max_length=1_000_000)
    tags: Tags | SkipJsonSchema[None] = None
    tools: list[Tool] | None = Field(default=None, max_length=1000)
    messages: list[Message] | None = Field(default=None, max_length=1000)
    tool_calls: list[ToolCall] | None = Field(default=None, max_length=100)


class ImportResult(BaseModel):
    imported: int


@router.get("")
async def list_prompts(
    caller: CurrentCaller,
    paging: PaginationParams,
    category: CategoryFilter = None,
    tag: TagFilter = None,
    search: SearchFilter = None,
) -> Page[PromptView]:
    """List training prompts by id. Administrators see all prompts, others their own."""
    async with get_database().read_transaction() as session:
        query = _filtered_query(session, caller, category, tag, search)
        rows = await paging.read(session, query.order_by(Prompt.id))
        return paging.page([_view(prompt) for prompt in rows.items], rows.total)


@router.post("", status_code=201)
async def create_prompt(body: PromptRequest, caller: CurrentCaller) -> PromptView:
    async with get_database().transaction() as session:
        return _view(await prompts.create(session, body, caller))


@router.post(
    "/import",
    status_code=201,
    openapi_extra=JSON_LINES_REQUEST,
)
async def import_prompts(request: Request, caller: CurrentCaller) -> ImportResult:
    """Create prompts from JSONL, one on each line. If a line is invalid, none is created."""
    async with receive_body(request, MAX_IMPORT_BYTES) as body:
        validated = body.with_name("checked.jsonl")
        count = await asyncio.to_thread(_validate_upload, body, validated)
        with validated.open("rb") as rows:
            async with get_database().transaction() as session:
                await prompts.create_many(session, map(orjson.loads, rows), caller)
    return ImportResult(imported=count)


@router.get(
    "/export",
    response_class=StreamingResponse,
    responses=JSON_LINES_RESPONSES,
)
async def export_prompts(
    caller: CurrentCaller, category: CategoryFilter = None, tag: TagFilter = None, search: SearchFilter = None
) -> StreamingResponse:
    """Download prompts as JSONL, in the format of the import."""

    async def lines() -> AsyncIterator[bytes]:
        last_id = 0
        while True:
            async with get_database().read_transaction() as session:
                query = _filtered_query(session, caller, category, tag, search).where(Prompt.id > last_id)
                page = list(await session.scalars(query.order_by(Prompt.id).limit(PAGE_SIZE)))
            if not page:
                return
            last_id = page[-1].id
            yield b"".join(
                orjson.dumps(prompts.to_request(prompt), option=orjson.OPT_APPEND_NEWLINE) for prompt in page
            )

    return StreamingResponse(lines(), media_type=JSON_LINES)


@router.get("/{prompt_id}")
async def show_prompt(prompt_id: PromptId, caller: CurrentCaller) -> PromptView:
    async with get_database().read_transaction() as session:
        return _view(await prompts.get(session, prompt_id, caller))


@router.put("/{prompt_id}")
async def change_prompt(prompt_id: PromptId, changes: PromptChanges, caller: CurrentCaller) -> PromptView:
    """Change the fields that are sent. Existing datasets with this prompt stay unchanged."""
    async with get_database().transaction() as session:
        prompt = await prompts.get(session, prompt_id, caller, lock=True)
        await prompts.update_prompt(session, prompt, changes.model_dump(exclude_unset=True))
        return _view(prompt)


@router.delete("/{prompt_id}", status_code=204)
async def delete_prompt(prompt_id: PromptId, caller: CurrentCaller) -> None:
    """Delete a prompt. Existing datasets with it stay unchanged."""
    async with get_database().transaction() as session:
        await session.delete(await prompts.get(session, prompt_id, caller, lock=True))


def _filtered_query(
    session: AsyncSession, caller: Principal, category: str | None, tag: str | None, search: str | None
) -> Select[Prompt]:
    tags = None if tag is None else [tag]
    query = visible(select(Prompt), Prompt, caller)
    return prompts.filter_prompts(session, query, category=category, tags=tags, search=search)


def _validate_upload(body: FilePath, validated: FilePath) -> int:
    """Write the validated prompts to another file, so that the transaction only has to insert them."""
    count = 0
    with body.open("rb") as file, validated.open("wb") as rows:
        for number, line in enumerate(read_lines(file), 1):
            if line.strip():
                prompt = prompts.read_line(line, f"line {number} of the upload")
                rows.write(orjson.dumps(prompts.to_columns(prompt), option=orjson.OPT_APPEND_NEWLINE))
                count += 1
    if not count:
        raise EmptyData("There is no prompt in the upload. Send one JSON object on each line.")
    return count


def _view(prompt: Prompt) -> PromptView:
    values: dict[str, Any] = {name: getattr(prompt, name) for name in PromptView.model_fields}
    return PromptView.model_validate(values)
