"""Long bodies, taken in as they come: onto the disk, not into memory."""

import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import Request

from cluster.errors import InvalidRequest


class UploadTooLarge(InvalidRequest):
    """The upload is larger than this route takes."""

    status = 413
    code = "BODY_TOO_LARGE"


@asynccontextmanager
async def received(request: Request, most_bytes: int) -> AsyncGenerator[Path]:
    """The body as a file that lasts as long as the block."""
    with tempfile.TemporaryDirectory(prefix="forgearr-upload-") as folder:
        path = Path(folder) / "body"
        size = 0
        with path.open("wb") as file:
            async for chunk in request.stream():
                size += len(chunk)
                if size > most_bytes:
                    raise UploadTooLarge(f"The body is larger than {most_bytes // 1024 // 1024} MiB.")
                file.write(chunk)
        yield path
