"""Middleware that validates the path and the body of a request before its route."""

import re
from collections.abc import AsyncIterator
from typing import Any

import orjson
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import ForgearrError, InvalidRequest
from serve.http.mounts import Marks, marks_of
from serve.security.callers import find_caller, send_error

MAX_BODY_BYTES = 32 * 1024 * 1024
MAX_ANONYMOUS_BODY_BYTES = 4 * 1024 * 1024
"""Without a credential, as for a login or a webhook. To parse a long document blocks all other requests."""
MAX_JSON_DEPTH = 100
JSON_CONTENT = re.compile(rb"application/([^;\s]+\+)?json\b", re.IGNORECASE | re.ASCII)


class BodyTooLarge(InvalidRequest):
    __doc__ = (
        f"The body is larger than {MAX_BODY_BYTES >> 20} MiB, or {MAX_ANONYMOUS_BODY_BYTES >> 20} without a credential."
    )

    status = 413
    code = "BODY_TOO_LARGE"


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
                receive = await _check_body(scope, receive)
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


async def _check_body(scope: Scope, receive: Receive) -> Receive:
    """Read and check JSON bodies, and bodies of unknown length, before the route. Others are passed on as a stream."""
    headers = dict(scope["headers"])
    length = headers.get(b"content-length")
    max_bytes = MAX_ANONYMOUS_BODY_BYTES
    if (length is None or int(length) > max_bytes) and await find_caller(HTTPConnection(scope)):
        max_bytes = MAX_BODY_BYTES
    if length is not None and int(length) > max_bytes:
        raise BodyTooLarge()
    # If a client sends the header twice, the route may use either one.
    is_json = any(name == b"content-type" and JSON_CONTENT.match(value) for name, value in scope["headers"])
    if not is_json and b"transfer-encoding" not in headers:
        return receive
    messages = [message async for message in _messages(receive, max_bytes)]
    if is_json:
        _check_json(b"".join(message.get("body", b"") for message in messages))
    return _replay(messages, receive)


async def _messages(receive: Receive, max_bytes: int) -> AsyncIterator[Message]:
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        if size > max_bytes:
            raise BodyTooLarge()
        more = message.get("more_body", False)
        yield message


def _replay(messages: list[Message], receive: Receive) -> Receive:
    pending = iter(messages)

    async def replay() -> Message:
        message = next(pending, None)
        return await receive() if message is None else message

    return replay


def _check_json(body: bytes) -> None:
    if not body:
        return
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None
    # Code that serializes or traverses such a document later would exceed the recursion limit.
    if body.count(b"[") + body.count(b"{") > MAX_JSON_DEPTH and _is_too_deep(document):
        raise InvalidRequest(f"JSON may be nested {MAX_JSON_DEPTH} levels deep at most.")
    # Only the escape can produce the character, and few documents contain it.
    if b"u0000" in body and _has_nul(document):
        raise InvalidRequest("Text may not contain the character U+0000.")


def _is_too_deep(document: Any) -> bool:
    level: list[Any] = [document]
    for _ in range(MAX_JSON_DEPTH):
        parents = [value.values() if isinstance(value, dict) else value for value in level]
        level = [child for children in parents for child in children if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def _has_nul(value: Any) -> bool:
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, list):
        return any(_has_nul(item) for item in value)
    if isinstance(value, dict):
        return any(_has_nul(item) for pair in value.items() for item in pair)
    return False
