"""The route /v1/chat/completions of OpenAI's API."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from secrets import token_hex
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from serve.engines.protocol import Chunk, Engine
from serve.http import sse
from serve.http.disconnect import cancel_on_disconnect
from serve.models.dependencies import get_engine, get_models
from serve.models.resolver import ResolvedModel
from serve.openai import choices as openai_choices
from serve.openai import streaming
from serve.openai.chat_schemas import ChatCompletion, ChatRequest
from serve.security.callers import CurrentCaller

router = APIRouter(prefix="/v1")


@router.post("/chat/completions", response_model=ChatCompletion, responses=sse.sse_responses("chat.completion.chunk"))
async def create_chat_completion(request: Request, body: ChatRequest, caller: CurrentCaller) -> Any:
    """Create a chat completion. With `stream`, the response is a stream of server-sent events."""
    model = await get_models(request).resolve(body.model, caller)
    if body.stream:
        return await _stream(request, body, model)
    completion = await cancel_on_disconnect(request, complete_chat(get_engine(request), model, body))
    return Response(orjson.dumps(completion), media_type="application/json")


async def complete_chat(engine: Engine, model: ResolvedModel, body: ChatRequest) -> dict[str, Any]:
    completions = await openai_choices.complete_all(engine, model, _engine_requests(body))
    choices = [{**completion["choices"][0], "index": index} for index, completion in enumerate(completions)]
    usage = openai_choices.sum_choice_usage([completion["usage"] for completion in completions])
    return {**_common_fields(body.model, "chat.completion"), "choices": choices, "usage": usage}


def _engine_requests(body: ChatRequest) -> list[dict[str, Any]]:
    return [body.for_engine(choice_index) for choice_index in range(body.n or 1)]


async def _stream(request: Request, body: ChatRequest, model: ResolvedModel) -> Response:
    engine, requests = get_engine(request), _engine_requests(body)
    if len(requests) == 1:
        stream = engine.chat(model.reference, requests[0], model.source, model.account)
    else:
        stream = _with_total_usage(openai_choices.stream_all(engine, model, requests))
    first = await cancel_on_disconnect(request, anext(stream))
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    common_fields = _common_fields(body.model, "chat.completion.chunk")
    return streaming.stream_completion(streaming.prepend(first, stream), common_fields, with_usage=with_usage)


async def _with_total_usage(stream: AsyncGenerator[list[Chunk]]) -> AsyncGenerator[list[Chunk]]:
    """Replace the usage of each choice with one total at the end."""
    usages: list[dict[str, Any]] = []
    async with aclosing(stream):
        async for chunks in stream:
            usages += [chunk["usage"] for chunk in chunks if "usage" in chunk]
            yield [chunk for chunk in chunks if chunk["choices"]]
    yield [{"choices": [], "usage": openai_choices.sum_choice_usage(usages)}]


def _common_fields(model: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}
