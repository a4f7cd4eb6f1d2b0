"""Middleware that refuses a large body while the disk has no room for it."""

import tempfile
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.errors import ForgearrError
from cluster.files import disk
from cluster.settings import home
from serve.security.callers import send_error

MAX_SMALL_BODY_BYTES = 64 * 1024
"""Such bodies always pass, so that people can log in, delete and cancel while the disk is full."""


class DiskSpaceMiddleware:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (size := _body_bytes(scope)) > MAX_SMALL_BODY_BYTES:
            try:
                # Files of a form are written to the folder for temporary files first.
                for folder in {home(), Path(tempfile.gettempdir())}:
                    disk.require_space(folder, size, "The request")
            except ForgearrError as error:
                return await send_error(error, scope, receive, send)
        await self.app(scope, receive, send)


def _body_bytes(scope: Scope) -> int:
    """The size of the body. One that is sent in chunks counts as just above a small one."""
    headers = dict(scope["headers"])
    if b"transfer-encoding" in headers:
        return MAX_SMALL_BODY_BYTES + 1
    length = headers.get(b"content-length", b"0")
    return int(length) if length.isdigit() else 0
