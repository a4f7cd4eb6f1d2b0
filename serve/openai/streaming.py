"""An engine's chunks as OpenAI's server-sent events."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import orjson
from fastapi.responses import StreamingResponse

from cluster.errors import ForgearrError
from serve.engines.protocol import Chunk
from serve.http.error_handlers import as_forgearr_error
from serve.http.errors import OPENAI_PREFIX, error_response
from serve.http.sse import event, sse_response


def stream_completion(
    answer: AsyncGenerator[list[Chunk]], heading: dict[str, Any], *, with_usage: bool
) -> StreamingResponse:
    return sse_response(_events(answer, {**heading, "usage": None} if with_usage else heading, with_usage))


async def prepend(first: list[Chunk], rest: AsyncGenerator[list[Chunk]]) -> AsyncGenerator[list[Chunk]]:
    """An answer whose first words were waited for, because until then an error still has a status."""
    async with aclosing(rest):
        yield first
        async for chunks in rest:
            yield chunks


async def _events(
    answer: AsyncGenerator[list[Chunk]], heading: dict[str, Any], with_usage: bool
) -> AsyncIterator[bytes]:
    async with aclosing(answer):
        try:
            async for chunks in answer:
                yield b"".join(
                    event(orjson.dumps({**heading, "choices": chunk["choices"], **_usage(chunk, with_usage)}))
                    for chunk in chunks
                    if chunk["choices"] or with_usage
                )
        except ForgearrError as error:
            yield event(error_response(as_forgearr_error(error), OPENAI_PREFIX).body)
            return
    yield event(b"[DONE]")


def _usage(chunk: Chunk, with_usage: bool) -> Chunk:
    return {"usage": chunk["usage"]} if with_usage and "usage" in chunk else {}
