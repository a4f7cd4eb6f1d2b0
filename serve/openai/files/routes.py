"""The routes /v1/files of OpenAI's API: the files that fine-tuning jobs and batches read and write."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from cluster.db import get_database
from cluster.files import store as file_store
from cluster.files.tables import MAX_ID_LENGTH, File
from cluster.settings import get_settings
from serve.http.errors import Responses
from serve.http.marks import streams_body
from serve.http.pagination import CursorPage, cursor_page, keyset_slice
from serve.http.uploads import receive_form
from serve.openai.files import validation
from serve.openai.files.schemas import BATCH_DAYS, DAY_SECONDS, DeletedFile, FileObject, file_fields, file_object
from serve.security.callers import CurrentCaller

router = APIRouter(prefix="/v1/files")

CHUNK_BYTES = 256 * 1024
MAX_LISTED = 10_000
MEBIBYTE = 1024 * 1024

FileId = Annotated[str, Field(max_length=MAX_ID_LENGTH)]
UPLOAD_FORM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["fine-tune", "batch", "user_data"]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": BATCH_DAYS * DAY_SECONDS},
    },
    "required": ["file", "purpose"],
    "additionalProperties": False,
}
CONTENT_RESPONSES: Responses = {
    200: {"description": "The content", "content": {"application/octet-stream": {"schema": {"type": "string"}}}}
}


@router.post(
    "",
    openapi_extra={
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": UPLOAD_FORM_SCHEMA}}}
    },
)
@streams_body
async def create_file(request: Request, caller: CurrentCaller) -> FileObject:
    """Upload a file. Files for fine-tuning and batches are validated at once; `status_details` has the error."""
    async with receive_form(request, get_settings().files.max_mb * MEBIBYTE) as form:
        fields, upload = file_fields(form)
        content, error = await asyncio.to_thread(validation.check_content, fields.purpose, upload.file, fields.filename)
        await upload.seek(0)
        file = await file_store.create_file(
            get_database(),
            upload.file,
            filename=fields.filename,
            purpose=fields.purpose,
            principal=caller,
            content=content,
            fault=error,
            lifetime=timedelta(seconds=fields.seconds) if fields.seconds else None,
        )
    return file_object(file)


@router.get("")
async def list_files(
    caller: CurrentCaller,
    after: Annotated[FileId | SkipJsonSchema[None], Query()] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = MAX_LISTED,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[Annotated[str, Field(max_length=40)] | SkipJsonSchema[None], Query()] = None,
) -> CursorPage[FileObject]:
    """List files, the newest first. Administrators see all files, others their own."""
    query = file_store.visible_to(caller)
    if purpose is not None:
        query = query.where(File.purpose == purpose)
    async with get_database().read_transaction() as session:
        last = await file_store.find(session, after, caller) if after is not None else None
        key, after_key = (File.created_at, File.id), last and (last.created_at, last.id)
        files = await keyset_slice(session, query, key, after_key, limit, ascending=order == "asc")
    return cursor_page([file_object(file) for file in files.items], files.has_more)


@router.get("/{file_id}")
async def show_file(file_id: FileId, caller: CurrentCaller) -> FileObject:
    """Get the metadata of a file."""
    async with get_database().read_transaction() as session:
        return file_object(await file_store.find(session, file_id, caller))


@router.get("/{file_id}/content", response_class=StreamingResponse, responses=CONTENT_RESPONSES)
async def read_file(file_id: FileId, caller: CurrentCaller) -> StreamingResponse:
    """Download the content of a file."""
    async with get_database().read_transaction() as session:
        file = await file_store.find(session, file_id, caller)
    content = await asyncio.to_thread(file_store.open_file, file)

    async def chunks() -> AsyncIterator[bytes]:
        with content:
            while chunk := await asyncio.to_thread(content.read, CHUNK_BYTES):
                yield chunk

    # No browser may render an uploaded file as a page of this server.
    headers = {
        "Content-Length": str(file.bytes),
        "Content-Disposition": f"attachment; filename*=utf-8''{quote(file.filename)}",
    }
    return StreamingResponse(chunks(), media_type="application/octet-stream", headers=headers)


@router.delete("/{file_id}")
async def delete_file(file_id: FileId, caller: CurrentCaller) -> DeletedFile:
    """Delete a file. Models that were trained with it stay."""
    await file_store.delete(get_database(), file_id, caller)
    return DeletedFile(id=file_id)
