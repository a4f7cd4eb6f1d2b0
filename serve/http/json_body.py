"""Checks JSON bodies: the number of their values while they are received, their content when they are complete.

A parser holds the interpreter, and so everybody else's requests, for as long as it makes objects. So the number of
objects is limited before it starts. The same holds for validation, which makes an object for each mistake.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import orjson
from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.types import Scope

from cluster.errors import InvalidRequest, UnprocessableRequest

MAX_VALUES = 120_000
MAX_DEPTH = 100
MAX_BYTES_ON_LOOP = 64 * 1024
"""Longer documents are parsed in a thread."""
MAX_VALUES_ON_LOOP = 10_000
"""Documents with more values are validated in a thread first."""
MAX_MISTAKES = 1000
"""Of such a document. The framework would describe each of them, on the event loop."""


SCOPE_KEY = "forgearr.json"
VALUES_SCOPE_KEY = "forgearr.json.values"

Result = TypeVar("Result")

# One document at a time: several threads would hold the interpreter in turn, and the event loop would wait for all.
_executor = ThreadPoolExecutor(1, thread_name_prefix="long-documents")


class TooManyValues(InvalidRequest):
    __doc__ = f"A JSON body may have {MAX_VALUES:,} values at most: send a file, or several requests."

    status = 413
    code = "TOO_MANY_VALUES"


class ValueCounter:
    """Counts the values of a document in its bytes, part by part, without parsing it."""

    def __init__(self) -> None:
        self.values = 1
        self.has_escapes = False
        self._in_string = False
        self._is_escaped = False

    def add(self, part: bytes) -> None:
        """Raise TooManyValues if the document has too many values up to the end of this part."""
        if self._is_escaped and part:
            part, self._is_escaped = part[1:], False
        if b"\\" in part:
            self.has_escapes = True
            # Without escapes, each quote begins or ends a string.
            part = part.replace(rb"\\", b"").replace(rb"\"", b"")
            self._is_escaped = part.endswith(b"\\")
        if self._in_string and b'"' not in part:
            return
        pieces = part.split(b'"')
        structure = b"".join(pieces[self._in_string :: 2])
        self._in_string ^= len(pieces) % 2 == 0
        # Each value is the first one of an array or object, or comes after a comma.
        self.values += structure.count(b",") + structure.count(b"[") + structure.count(b"{")
        if self.values > MAX_VALUES:
            raise TooManyValues()


class CheckedRequest(Request):
    """A request whose JSON was parsed when it was checked, and is not parsed again."""

    async def json(self) -> Any:
        return self.scope[SCOPE_KEY] if SCOPE_KEY in self.scope else await super().json()


async def check_json(scope: Scope, body: bytes, counter: ValueCounter) -> None:
    """Raise InvalidRequest if the body is not valid JSON, or contains what a database cannot store."""
    scope[VALUES_SCOPE_KEY] = counter.values
    if len(body) > MAX_BYTES_ON_LOOP:
        scope[SCOPE_KEY] = await _run_long(_parse, body, counter)
    elif body:
        scope[SCOPE_KEY] = _parse(body, counter)


async def refuse_many_mistakes(scope: Scope, body_type: Any) -> None:
    """Raise UnprocessableRequest if the document has too many values that are not valid, without describing them."""
    if scope.get(VALUES_SCOPE_KEY, 0) > MAX_VALUES_ON_LOOP:
        count = await _run_long(_count_mistakes, body_type, scope[SCOPE_KEY])
        if count > MAX_MISTAKES:
            raise UnprocessableRequest(f"The body has {count:,} fields that are not valid, too many to name them.")


async def _run_long(function: Callable[..., Result], *args: Any) -> Result:
    return await asyncio.get_running_loop().run_in_executor(_executor, function, *args)


def _count_mistakes(body_type: Any, document: Any) -> int:
    try:
        _adapter(body_type).validate_python(document)
    except ValidationError as error:
        return error.error_count()
    return 0


@cache
def _adapter(body_type: Any) -> TypeAdapter[Any]:
    return TypeAdapter(body_type)


def _parse(body: bytes, counter: ValueCounter) -> Any:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None
    # Code that serializes or traverses such a document later would exceed the recursion limit.
    if counter.values > MAX_DEPTH and _is_too_deep(document):
        raise InvalidRequest(f"JSON may be nested {MAX_DEPTH} levels deep at most.")
    # Only the escape can produce the character, and few documents contain it.
    if counter.has_escapes and b"u0000" in body and _has_nul(document):
        raise InvalidRequest("Text may not contain the character U+0000.")
    return document


def _is_too_deep(document: Any) -> bool:
    level: list[Any] = [document]
    for _ in range(MAX_DEPTH):
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
