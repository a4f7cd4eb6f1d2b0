"""Receives large request bodies and forms as a stream, to disk instead of memory."""

import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import Request
from starlette.datastructures import FormData
from starlette.formparsers import MultiPartException, MultiPartParser

from cluster.errors import InvalidRequest

MAX_FORM_OVERHEAD_BYTES = 1024 * 1024
"""For the parts of a form besides its file."""
MAX_FIELDS = 10


class UploadTooLarge(InvalidRequest):
    """The upload is larger than this route allows."""

    status = 413
    code = "BODY_TOO_LARGE"


class NotAForm(InvalidRequest):
    """The body must be a form: multipart/form-data."""

    code = "INVALID_FORM"


@asynccontextmanager
async def receive_body(request: Request, max_bytes: int) -> AsyncGenerator[Path]:
    """The body as a temporary file, which is deleted at the end of the block."""
    with tempfile.TemporaryDirectory(prefix="forgearr-upload-") as folder:
        path = Path(folder) / "body"
        with path.open("wb") as file:
            async for chunk in _bounded(request, max_bytes):
                file.write(chunk)
        yield path


@asynccontextmanager
async def receive_form(request: Request, max_bytes: int) -> AsyncGenerator[FormData]:
    """The body as a form. Its file is deleted at the end of the block."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise NotAForm
    stream = _bounded(request, max_bytes + MAX_FORM_OVERHEAD_BYTES)
    try:
        form = await MultiPartParser(request.headers, stream, max_files=1, max_fields=MAX_FIELDS).parse()
    except MultiPartException as error:
        raise NotAForm(f"The form is not valid: {error.message}") from None
    try:
        yield form
    finally:
        await form.close()


async def _bounded(request: Request, max_bytes: int) -> AsyncGenerator[bytes]:
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise UploadTooLarge(f"The body is larger than {max_bytes // 1024 // 1024} MiB.")
        yield chunk
