"""The routes /v1/uploads of OpenAI's API: files that are too large for one request are sent in parts."""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field

from cluster.db import get_database
from cluster.files import uploads as file_uploads
from cluster.settings import get_settings
from serve.http.marks import streams_body
from serve.http.uploads import UploadTooLarge, receive_form
from serve.openai.files import validation
from serve.openai.files.routes import MEBIBYTE
from serve.openai.files.schemas import (
    CompleteUploadRequest,
    PartObject,
    UploadObject,
    UploadRequest,
    only_file,
    upload_object,
)
from serve.security.callers import CurrentCaller

router = APIRouter(prefix="/v1/uploads")

MAX_PART_MB = 64

UploadId = Annotated[str, Field(max_length=40)]
PART_FORM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"data": {"type": "string", "format": "binary"}},
    "required": ["data"],
}


@router.post("")
async def create_upload(body: UploadRequest, caller: CurrentCaller) -> UploadObject:
    """Start an upload in parts. It expires after one hour."""
    max_mb = get_settings().files.max_upload_mb
    if body.bytes > max_mb * MEBIBYTE:
        raise UploadTooLarge(f"An upload in parts may have {max_mb} MiB at most (files.max_upload_mb).")
    async with get_database().transaction() as session:
        upload = await file_uploads.begin(
            session,
            filename=body.filename,
            purpose=body.purpose,
            size=body.bytes,
            file_seconds=body.seconds,
            principal=caller,
        )
    return upload_object(upload)


@router.post(
    "/{upload_id}/parts",
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": PART_FORM_SCHEMA}}}},
)
@streams_body
async def add_part(upload_id: UploadId, request: Request, caller: CurrentCaller) -> PartObject:
    """Add a part of up to 64 MiB. Parts may be sent in any order, in parallel and repeatedly."""
    async with get_database().read_transaction() as session:
        await file_uploads.find_pending(session, upload_id, caller)
    async with receive_form(request, MAX_PART_MB * MEBIBYTE) as form:
        data = only_file(form, "data")
        part = await file_uploads.add_part(get_database(), upload_id, data.file, data.size or 0, caller)
    return PartObject(id=part.id, created_at=int(part.created_at.timestamp()), upload_id=upload_id)


@router.post("/{upload_id}/complete")
async def complete_upload(upload_id: UploadId, body: CompleteUploadRequest, caller: CurrentCaller) -> UploadObject:
    """Create the file from its parts. Together they must have the announced size."""
    upload, file = await file_uploads.complete(
        get_database(), upload_id, body.part_ids, body.md5, validation.check_content, caller
    )
    return upload_object(upload, file)


@router.post("/{upload_id}/cancel")
async def cancel_upload(upload_id: UploadId, caller: CurrentCaller) -> UploadObject:
    """Cancel an upload, and delete its parts."""
    return upload_object(await file_uploads.cancel(get_database(), upload_id, caller))
