"""The routes /api/blobs of Ollama's API: files that clients upload before they create models from them."""

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from cluster.db import get_database
from pipelines.training.models import blobs
from serve.http.marks import streams_body
from serve.security.callers import AdminCaller

router = APIRouter(prefix="/api/blobs")

Digest = Annotated[str, Path(pattern=r"^sha256[:-][0-9a-f]{64}$", examples=[f"sha256:{'0' * 64}"])]
DIGEST_PREFIX_LENGTH = len("sha256:")
BLOB_REQUEST_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.head("/{digest}", response_class=Response)
async def find_blob(digest: Digest, caller: AdminCaller) -> Response:
    """Check whether there is a file with this digest: 200 or 404."""
    await blobs.touch(get_database(), digest[DIGEST_PREFIX_LENGTH:])
    return Response()


@router.post("/{digest}", status_code=201, response_class=Response, openapi_extra=BLOB_REQUEST_BODY)
@streams_body
async def send_blob(request: Request, digest: Digest, caller: AdminCaller) -> Response:
    """Upload a file, which must have this digest. It is deleted after a day, unless a model uses it."""
    await blobs.receive(get_database(), digest[DIGEST_PREFIX_LENGTH:], request.stream())
    return Response(status_code=201)
