"""Sends an engine's chunks as server-sent events in OpenAI's format."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import orjson
from fastapi.responses import StreamingResponse

from cluster.errors import ForgearrError
from serve.engines.protocol import Chunk
from serve.http.error_handlers import as_forgearr_error
from serve.http.errors import error_response
from serve.http.sse import event, sse_response


def stream_completion(
    stream: AsyncGenerator[list[Chunk]], common_fields: dict[str, Any], *, with_usage: bool
) -> StreamingResponse:
    """`common_fields` are in each event."""
    if with_usage:
        common_fields = {**common_fields, "usage": None}
    return sse_response(_events(stream, common_fields, with_usage))


async def prepend(first: list[Chunk], rest: AsyncGenerator[list[Chunk]]) -> AsyncGenerator[list[Chunk]]:
    """The whole stream again, after its first chunks were awaited. Until then an error can still set the status."""
    async with aclosing(rest):
        yield first
        async for chunks in rest:
            yield chunks


async def _events(
    stream: AsyncGenerator[list[Chunk]], common_fields: dict[str, Any], with_usage: bool
) -> AsyncIterator[bytes]:
    async with aclosing(stream):
        try:
            async for chunks in stream:
                yield b"".join(
                    event(orjson.dumps({**common_fields, "choices": chunk["choices"], **_usage(chunk, with_usage)}))
                    for chunk in chunks
                    if chunk["choices"] or with_usage
                )
        except ForgearrError as error:
            yield event(error_response(as_forgearr_error(error), "openai").body)
            return
    yield event(b"[DONE]")


def _usage(chunk: Chunk, with_usage: bool) -> Chunk:
    return {"usage": chunk["usage"]} if with_usage and "usage" in chunk else {}
