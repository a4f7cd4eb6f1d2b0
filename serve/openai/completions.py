"""/v1/completions, as OpenAI has it: prompts that are gone on from, without a conversation around them."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from itertools import accumulate
from secrets import token_hex
from typing import Annotated, Any, Literal, Self

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field, model_validator

from serve.engines.options import MOST_SEEDS
from serve.engines.protocol import Chunk, Engine
from serve.http import sse
from serve.http.disconnect import while_connected
from serve.http.errors import OPENAI_ERROR_RESPONSES
from serve.http.schemas import Strict
from serve.models.dependencies import engine_of, models_of
from serve.models.resolver import Meant
from serve.openai import choices as openai_choices
from serve.openai import streaming
from serve.openai.chat_schemas import Grammar, ModelReference, StreamOptions, Usage
from serve.security.callers import CurrentCaller, owner_of

router = APIRouter(prefix="/v1", tags=["Chat"], responses=OPENAI_ERROR_RESPONSES)

MOST_PROMPTS = 128
DEFAULT_TOKENS = 16
"""OpenAI's."""


class CompletionRequest(Strict):
    """OpenAI's request. What is not here is refused, since the answer would not be what was asked for."""

    model: ModelReference
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
    max_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1, description=f"Null: {DEFAULT_TOKENS}.")
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    stop: str | list[str] | None = Field(default=None, max_length=1000)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    logprobs: int | None = Field(default=None, ge=0, le=20, description="How many of the likeliest tokens to tell.")
    echo: bool | None = Field(default=None, description="Begin the answer with the prompt.")
    suffix: str | None = Field(default=None, description="What comes after the answer, for models that can fill gaps.")
    grammar: Grammar | None = None
    n: Literal[1] | None = None
    best_of: Literal[1] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, description="Not used.")

    @model_validator(mode="after")
    def fit_together(self) -> Self:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is for answers with stream")
        if self.echo and self.logprobs is not None:
            raise ValueError("logprobs of an echoed prompt are not available")
        return self

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    def for_engine(self, prompt: str) -> dict[str, Any]:
        passed_on = {
            "temperature",
            "top_p",
            "frequency_penalty",
            "presence_penalty",
            "logprobs",
            "suffix",
            "grammar",
        }
        wanted = self.model_dump(include=passed_on, exclude_none=True)
        wanted |= {"prompt": prompt, "max_tokens": self.max_tokens or DEFAULT_TOKENS}
        if self.stop:
            wanted["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        if self.seed is not None:
            wanted["seed"] = self.seed % MOST_SEEDS
        return wanted


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


@router.post("/completions", response_model=Completion, responses=sse.described("text_completion"))
async def create_completion(request: Request, wanted: CompletionRequest, caller: CurrentCaller) -> Any:
    """Go on from one prompt or several, whole or as server-sent events."""
    meant = await models_of(request).resolve(wanted.model, owner_of(caller))
    if wanted.stream:
        spoken = _told(wanted, openai_choices.speak(engine_of(request), meant, _requests(wanted)))
        first = await while_connected(request, anext(spoken))
        with_usage = bool(wanted.stream_options and wanted.stream_options.include_usage)
        return streaming.respond(streaming.rejoined(first, spoken), _heading(wanted.model), with_usage=with_usage)
    told = await while_connected(request, answer_completion(engine_of(request), meant, wanted))
    return Response(orjson.dumps(told), media_type="application/json")


async def answer_completion(engine: Engine, meant: Meant, wanted: CompletionRequest) -> dict[str, Any]:
    """The whole answer."""
    answers = await openai_choices.complete(engine, meant, _requests(wanted))
    choices = [_choice(wanted, index, answer["choices"][0]) for index, answer in enumerate(answers)]
    usage = openai_choices.of_prompts([answer["usage"] for answer in answers])
    return {**_heading(wanted.model), "choices": choices, "usage": usage}


def _requests(wanted: CompletionRequest) -> list[dict[str, Any]]:
    return [wanted.for_engine(prompt) for prompt in wanted.prompts]


def _heading(model: str) -> dict[str, Any]:
    return {
        "id": f"cmpl-{token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
    }


async def _told(wanted: CompletionRequest, spoken: AsyncGenerator[list[Chunk]]) -> AsyncGenerator[list[Chunk]]:
    """A stream as OpenAI has it: perhaps with the prompts, and at last with what all of it used."""
    offsets: dict[int, int] = {}
    usages: list[dict[str, int]] = []
    async with aclosing(spoken):
        async for chunks in spoken:
            told: list[Chunk] = []
            for chunk in chunks:
                usages += [chunk["usage"]] if "usage" in chunk else []
                for choice in chunk["choices"]:
                    index = choice["index"]
                    if index not in offsets:
                        offsets[index] = 0
                        told += _echo(wanted, index)
                    told.append({"choices": [{**choice, "logprobs": _logprobs(choice, offsets[index])}]})
                    offsets[index] += len(choice["text"])
            yield told
    yield [{"choices": [], "usage": openai_choices.of_prompts(usages)}]


def _echo(wanted: CompletionRequest, index: int) -> list[Chunk]:
    told = {"index": index, "text": wanted.prompts[index], "logprobs": None, "finish_reason": None}
    return [{"choices": [told]}] if wanted.echo else []


def _choice(wanted: CompletionRequest, index: int, answered: dict[str, Any]) -> dict[str, Any]:
    echo = wanted.prompts[index] if wanted.echo else ""
    return {**answered, "index": index, "text": echo + answered["text"], "logprobs": _logprobs(answered, len(echo))}


def _logprobs(choice: dict[str, Any], offset: int) -> dict[str, Any] | None:
    """llama.cpp tells them as of a conversation."""
    told = (choice.get("logprobs") or {}).get("content")
    if not told:
        return None
    tokens = [one["token"] for one in told]
    return {
        "tokens": tokens,
        "token_logprobs": [one["logprob"] for one in told],
        "top_logprobs": [{top["token"]: top["logprob"] for top in one["top_logprobs"]} for one in told],
        "text_offset": [offset, *accumulate(map(len, tokens[:-1]), initial=offset)][1:],
    }
