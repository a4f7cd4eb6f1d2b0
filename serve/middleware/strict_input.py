"""Middleware that validates the path and the body of a request before its route.

A body is read after its sender is known: a stranger's is short, or is not read at all.
"""

import re

from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import ForgearrError, InvalidRequest, Unauthenticated
from serve.http.json_body import ValueCounter, check_json
from serve.http.marks import Access
from serve.http.mounts import Marks, marks_of
from serve.security.callers import find_caller, send_error

MAX_BODY_BYTES = 32 * 1024 * 1024
MAX_ANONYMOUS_BODY_BYTES = 64 * 1024
"""Without a credential, as for a login."""
MAX_SIGNED_BODY_BYTES = 4 * 1024 * 1024
"""Of a webhook. Its route verifies the signature before it parses the body."""
JSON_CONTENT = re.compile(rb"application/([^;\s]+\+)?json\b", re.IGNORECASE | re.ASCII)


class BodyTooLarge(InvalidRequest):
    """The body is too large."""

    status = 413
    code = "BODY_TOO_LARGE"

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"The body may have {max_bytes / 1024:,.0f} KiB here at most.")


class InputValidationMiddleware:
    """Rejects invalid JSON, text that databases cannot store, and bodies that are too large."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        try:
            _check_address(scope)
            marks = marks_of(scope)
            if marks.envelope == "ollama" and not marks.streams_body:
                scope = _with_json_content_type(scope)
            if scope["type"] == "http" and _should_check_body(scope, marks):
                receive = await _check_body(scope, receive, marks.access)
        except ForgearrError as error:
            return await send_error(error, scope, receive, send)
        await self.app(scope, receive, send)


def _with_json_content_type(scope: Scope) -> Scope:
    """Ollama parses every body as JSON. Its guides use `curl -d`, which declares a form."""
    headers = [header for header in scope["headers"] if header[0] != b"content-type"]
    return {**scope, "headers": [*headers, (b"content-type", b"application/json")]}


def _should_check_body(scope: Scope, marks: Marks) -> bool:
    return scope["method"] not in {"GET", "HEAD", "OPTIONS"} and not marks.streams_body


def _check_address(scope: Scope) -> None:
    if b"%00" in scope["query_string"] or "\0" in scope["path"]:
        raise InvalidRequest("The URL may not contain the character U+0000.")


async def _check_body(scope: Scope, receive: Receive, access: Access | None) -> Receive:
    """Read and check JSON bodies, and bodies of unknown length, before the route. Others are passed on as a stream."""
    headers = dict(scope["headers"])
    length = None if b"transfer-encoding" in headers else int(headers.get(b"content-length", 0))
    max_bytes = await _max_body_bytes(HTTPConnection(scope), access, length)
    if length is not None and length > max_bytes:
        raise BodyTooLarge(max_bytes)
    # If a client sends the header twice, the route may use either one.
    is_json = any(name == b"content-type" and JSON_CONTENT.match(value) for name, value in scope["headers"])
    if access == "signed":
        is_json = False
    if not is_json and length is not None:
        return receive
    counter = ValueCounter() if is_json else None
    body = await _read_body(receive, max_bytes, counter)
    if counter:
        await check_json(scope, body, counter)
    return _replay(body, receive)


async def _max_body_bytes(connection: HTTPConnection, access: Access | None, length: int | None) -> int:
    """The limit for this caller, who is refused here if the route is not for strangers. `length` None is unknown."""
    if access == "signed":
        return MAX_SIGNED_BODY_BYTES
    if access in {"user", "admin"}:
        if await find_caller(connection) is None:
            raise Unauthenticated()
        return MAX_BODY_BYTES
    is_short = length is not None and length <= MAX_ANONYMOUS_BODY_BYTES
    if is_short or await find_caller(connection) is None:
        return MAX_ANONYMOUS_BODY_BYTES
    return MAX_BODY_BYTES


async def _read_body(receive: Receive, max_bytes: int, counter: ValueCounter | None) -> bytes:
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect()
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            raise BodyTooLarge(max_bytes)
        if counter:
            counter.add(part)
        parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    is_pending = True

    async def replay() -> Message:
        nonlocal is_pending
        if not is_pending:
            return await receive()
        is_pending = False
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
