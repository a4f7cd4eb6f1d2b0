"""The route /v1/completions of OpenAI's API: completes prompts without a chat template."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from itertools import accumulate
from secrets import token_hex
from typing import Annotated, Any, Literal, Self

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field, model_validator

from serve.engines.options import SEED_MODULUS
from serve.engines.protocol import Chunk, Engine
from serve.http import sse
from serve.http.disconnect import cancel_on_disconnect
from serve.http.schemas import StrictModel
from serve.models.dependencies import get_engine, get_models
from serve.models.resolver import ResolvedModel
from serve.openai import choices as openai_choices
from serve.openai import streaming
from serve.openai.chat_schemas import Grammar, ModelReference, StreamOptions, Usage
from serve.security.callers import CurrentCaller

router = APIRouter(prefix="/v1")

MAX_PROMPTS = 128
DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


class CompletionRequest(StrictModel):
    """OpenAI's request. An unsupported field is an error, because it would have no effect."""

    model: ModelReference
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
    max_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1, description=f"Null: {DEFAULT_MAX_TOKENS}.")
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    stop: str | list[str] | None = Field(default=None, max_length=1000)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    logprobs: int | None = Field(default=None, ge=0, le=20, description="Number of most likely tokens to report.")
    echo: bool | None = Field(default=None, description="Start the text with the prompt.")
    suffix: str | None = Field(
        default=None, description="The text after the gap, for models that can fill in the middle."
    )
    grammar: Grammar | None = None
    n: Literal[1] | None = None
    best_of: Literal[1] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, description="Not used.")

    @model_validator(mode="after")
    def validate_combination(self) -> Self:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options needs stream")
        if self.echo and self.logprobs is not None:
            raise ValueError("logprobs are not available together with echo")
        return self

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    def for_engine(self, prompt: str) -> dict[str, Any]:
        passthrough_fields = {
            "temperature",
            "top_p",
            "frequency_penalty",
            "presence_penalty",
            "logprobs",
            "suffix",
            "grammar",
        }
        engine_request = self.model_dump(include=passthrough_fields, exclude_none=True)
        engine_request |= {"prompt": prompt, "max_tokens": self.max_tokens or DEFAULT_MAX_TOKENS}
        if self.stop:
            engine_request["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        if self.seed is not None:
            engine_request["seed"] = self.seed % SEED_MODULUS
        return engine_request


class Logprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Choice(BaseModel):
    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    id: str = Field(examples=["cmpl-3f0c"])
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


@router.post("/completions", response_model=Completion, responses=sse.sse_responses("text_completion"))
async def create_completion(request: Request, body: CompletionRequest, caller: CurrentCaller) -> Any:
    """Complete one or more prompts. With `stream`, the response is a stream of server-sent events."""
    model = await get_models(request).resolve(body.model, caller)
    if body.stream:
        stream = _to_openai_stream(body, openai_choices.stream_all(get_engine(request), model, _engine_requests(body)))
        first = await cancel_on_disconnect(request, anext(stream))
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return streaming.stream_completion(
            streaming.prepend(first, stream), _common_fields(body.model), with_usage=with_usage
        )
    completion = await cancel_on_disconnect(request, complete_prompts(get_engine(request), model, body))
    return Response(orjson.dumps(completion), media_type="application/json")


async def complete_prompts(engine: Engine, model: ResolvedModel, body: CompletionRequest) -> dict[str, Any]:
    completions = await openai_choices.complete_all(engine, model, _engine_requests(body))
    choices = [_choice(body, index, completion["choices"][0]) for index, completion in enumerate(completions)]
    usage = openai_choices.sum_usage([completion["usage"] for completion in completions])
    return {**_common_fields(body.model), "choices": choices, "usage": usage}


def _engine_requests(body: CompletionRequest) -> list[dict[str, Any]]:
    return [body.for_engine(prompt) for prompt in body.prompts]


def _common_fields(model: str) -> dict[str, Any]:
    return {
        "id": f"cmpl-{token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
    }


async def _to_openai_stream(
    body: CompletionRequest, stream: AsyncGenerator[list[Chunk]]
) -> AsyncGenerator[list[Chunk]]:
    """Add the echoed prompts, convert logprobs, and end with the usage of all prompts together."""
    offsets: dict[int, int] = {}
    usages: list[dict[str, int]] = []
    async with aclosing(stream):
        async for chunks in stream:
            converted: list[Chunk] = []
            for chunk in chunks:
                usages += [chunk["usage"]] if "usage" in chunk else []
                for choice in chunk["choices"]:
                    index = choice["index"]
                    if index not in offsets:
                        offsets[index] = 0
                        converted += _echo_chunk(body, index)
                    converted.append({"choices": [{**choice, "logprobs": _to_openai_logprobs(choice, offsets[index])}]})
                    offsets[index] += len(choice["text"])
            yield converted
    yield [{"choices": [], "usage": openai_choices.sum_usage(usages)}]


def _echo_chunk(body: CompletionRequest, index: int) -> list[Chunk]:
    choice = {"index": index, "text": body.prompts[index], "logprobs": None, "finish_reason": None}
    return [{"choices": [choice]}] if body.echo else []


def _choice(body: CompletionRequest, index: int, choice: dict[str, Any]) -> dict[str, Any]:
    echo = body.prompts[index] if body.echo else ""
    return {**choice, "index": index, "text": echo + choice["text"], "logprobs": _to_openai_logprobs(choice, len(echo))}


def _to_openai_logprobs(choice: dict[str, Any], offset: int) -> dict[str, Any] | None:
    """Convert from the format of chats, which engines use for prompts too."""
    logprobs = (choice.get("logprobs") or {}).get("content")
    if not logprobs:
        return None
    tokens = [logprob["token"] for logprob in logprobs]
    return {
        "tokens": tokens,
        "token_logprobs": [logprob["logprob"] for logprob in logprobs],
        "top_logprobs": [{top["token"]: top["logprob"] for top in logprob["top_logprobs"]} for logprob in logprobs],
        "text_offset": [offset, *accumulate(map(len, tokens[:-1]), initial=offset)][1:],
    }
