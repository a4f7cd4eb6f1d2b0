"""/v1/chat/completions, as OpenAI has it, and /v1/query, a question in one line."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from secrets import token_hex
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from cluster.errors import ForgearrError
from serve.answering import engine_of, models_of, while_connected
from serve.auth import CurrentCaller
from serve.bodies.chat import ChatCompletion, ChatRequest, Query, QueryAnswer
from serve.engines.protocol import Chunk
from serve.envelope import OPENAI_ERROR_RESPONSES, OPENAI_PREFIX, Responses, as_forgearr_error, error_response
from serve.models import Meant

router = APIRouter(prefix="/v1", tags=["Chat"], responses=OPENAI_ERROR_RESPONSES)

STREAMED: Responses = {
    200: {
        "content": {
            "text/event-stream": {
                "itemSchema": {
                    "type": "object",
                    "properties": {"data": {"type": "string", "description": "A chat.completion.chunk, or [DONE]."}},
                    "required": ["data"],
                }
            }
        }
    }
}


@router.post("/chat/completions", response_model=ChatCompletion, responses=STREAMED)
async def create_chat_completion(request: Request, wanted: ChatRequest, caller: CurrentCaller) -> Any:
    """Answer a conversation, whole or as server-sent events; as OpenAI's clients know it."""
    meant = await models_of(request).resolve(wanted.model)
    if wanted.stream:
        return await _stream(request, wanted, meant)
    answer = await while_connected(
        request, engine_of(request).complete(meant.reference, wanted.for_engine(), meant.version)
    )
    told = {**_heading(wanted.model, "chat.completion"), "choices": answer["choices"], "usage": answer["usage"]}
    return Response(orjson.dumps(told), media_type="application/json")


@router.post("/query")
async def query(request: Request, wanted: Query, caller: CurrentCaller) -> QueryAnswer:
    """Answer a single question."""
    meant = await models_of(request).resolve(wanted.model)
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": wanted.prompt}]}
    if wanted.temperature is not None:
        asked["temperature"] = wanted.temperature
    answer = await while_connected(request, engine_of(request).complete(meant.reference, asked, meant.version))
    return QueryAnswer(
        response=answer["choices"][0]["message"]["content"] or "",
        model=wanted.model,
        tokens_used=answer["usage"]["total_tokens"],
    )


async def _stream(request: Request, wanted: ChatRequest, meant: Meant) -> Response:
    """The first words are waited for, because until then an error still has a status."""
    answer = engine_of(request).chat(meant.reference, wanted.for_engine(), meant.version)
    first = await while_connected(request, anext(answer))
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(_events(wanted, first, answer), media_type="text/event-stream", headers=headers)


async def _events(
    wanted: ChatRequest, first: list[Chunk], answer: AsyncGenerator[list[Chunk]]
) -> AsyncGenerator[bytes]:
    heading = _heading(wanted.model, "chat.completion.chunk")
    with_usage = bool(wanted.stream_options and wanted.stream_options.include_usage)
    if with_usage:
        heading["usage"] = None
    async with aclosing(answer):
        try:
            yield _told(first, heading, with_usage)
            async for chunks in answer:
                yield _told(chunks, heading, with_usage)
        except ForgearrError as error:
            yield _event(error_response(as_forgearr_error(error), OPENAI_PREFIX).body)
            return
    yield _event(b"[DONE]")


def _told(chunks: list[Chunk], heading: dict[str, Any], with_usage: bool) -> bytes:
    return b"".join(
        _event(orjson.dumps({**heading, "choices": chunk["choices"], **_usage(chunk, with_usage)}))
        for chunk in chunks
        if chunk["choices"] or with_usage
    )


def _usage(chunk: Chunk, wanted: bool) -> Chunk:
    return {"usage": chunk["usage"]} if wanted and "usage" in chunk else {}


def _event(data: bytes | memoryview) -> bytes:
    return b"data: " + data + b"\n\n"


def _heading(model: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}
