"""/v1/chat/completions, as OpenAI has it, and /v1/query, a question in one line."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from secrets import token_hex
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from serve.engines.protocol import Chunk, Engine
from serve.http import sse
from serve.http.disconnect import while_connected
from serve.http.errors import OPENAI_ERROR_RESPONSES
from serve.models.dependencies import engine_of, models_of
from serve.models.resolver import Meant
from serve.openai import choices as openai_choices
from serve.openai import streaming
from serve.openai.chat_schemas import ChatCompletion, ChatRequest
from serve.security.callers import CurrentCaller, owner_of

router = APIRouter(prefix="/v1", tags=["Chat"], responses=OPENAI_ERROR_RESPONSES)


@router.post("/chat/completions", response_model=ChatCompletion, responses=sse.described("chat.completion.chunk"))
async def create_chat_completion(request: Request, wanted: ChatRequest, caller: CurrentCaller) -> Any:
    """Answer a conversation, whole or as server-sent events; as OpenAI's clients know it."""
    meant = await models_of(request).resolve(wanted.model, owner_of(caller))
    if wanted.stream:
        return await _stream(request, wanted, meant)
    told = await while_connected(request, answer_chat(engine_of(request), meant, wanted))
    return Response(orjson.dumps(told), media_type="application/json")


async def answer_chat(engine: Engine, meant: Meant, wanted: ChatRequest) -> dict[str, Any]:
    """The whole answer."""
    answers = await openai_choices.complete(engine, meant, _requests(wanted))
    choices = [{**answer["choices"][0], "index": index} for index, answer in enumerate(answers)]
    usage = openai_choices.of_one_prompt([answer["usage"] for answer in answers])
    return {**_heading(wanted.model, "chat.completion"), "choices": choices, "usage": usage}


def _requests(wanted: ChatRequest) -> list[dict[str, Any]]:
    return [wanted.for_engine(number) for number in range(wanted.n or 1)]


async def _stream(request: Request, wanted: ChatRequest, meant: Meant) -> Response:
    engine, requests = engine_of(request), _requests(wanted)
    if len(requests) == 1:
        answer = engine.chat(meant.reference, requests[0], meant.source)
    else:
        answer = _with_one_usage(openai_choices.speak(engine, meant, requests))
    first = await while_connected(request, anext(answer))
    with_usage = bool(wanted.stream_options and wanted.stream_options.include_usage)
    heading = _heading(wanted.model, "chat.completion.chunk")
    return streaming.respond(streaming.rejoined(first, answer), heading, with_usage=with_usage)


async def _with_one_usage(answer: AsyncGenerator[list[Chunk]]) -> AsyncGenerator[list[Chunk]]:
    """Several answers, and at last what all of them used."""
    usages: list[dict[str, Any]] = []
    async with aclosing(answer):
        async for chunks in answer:
            usages += [chunk["usage"] for chunk in chunks if "usage" in chunk]
            yield [chunk for chunk in chunks if chunk["choices"]]
    yield [{"choices": [], "usage": openai_choices.of_one_prompt(usages)}]


def _heading(model: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}
