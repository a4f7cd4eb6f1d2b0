"""/v1/chat/completions, as OpenAI has it, and /v1/query, a question in one line."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from secrets import token_hex
from typing import Annotated, Any, Literal, Self, TypeVar

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.errors import ForgearrError
from serve.auth import CurrentCaller
from serve.engines.protocol import Chunk, Engine
from serve.envelope import OPENAI_ERROR_RESPONSES, OPENAI_PREFIX, Responses, as_forgearr_error, error_response
from serve.models import Meant, Models

router = APIRouter(prefix="/v1", tags=["Chat"], responses=OPENAI_ERROR_RESPONSES)

ModelReference = Annotated[
    str,
    Field(min_length=1, max_length=120, examples=["homelab:latest"], description="NAME:latest, or NAME:v3 for good."),
]
PASSED_ON = {
    "temperature",
    "top_p",
    "frequency_penalty",
    "presence_penalty",
    "logprobs",
    "top_logprobs",
    "parallel_tool_calls",
    "response_format",
}
"""What llama.cpp takes as it comes."""
MOST_SEEDS = 2**32 - 1
Answered = TypeVar("Answered")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(Strict):
    type: Literal["text"]
    text: str


class FunctionCall(Strict):
    name: str = Field(min_length=1)
    arguments: str = Field(description="JSON.")


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Strict):
    """What somebody has said. An answer may be sent back as it came; what OpenAI adds to those must be null."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = Field(default=None, description="Of a tool's message: the call that it answers.")
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = Field(default=None, max_length=0)

    @model_validator(mode="after")
    def say_something(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"a message of the role {self.role} has content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only a message of the role assistant has tool_calls")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("a message of the role tool, and no other, has a tool_call_id")
        return self

    def for_engine(self) -> dict[str, Any]:
        said: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content,
        }
        told = self.model_dump(include={"name", "tool_calls", "tool_call_id", "reasoning_content"}, exclude_none=True)
        return said | told


class Function(Strict):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict, description="JSON Schema.")
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class ChosenFunction(Strict):
    name: str


class ChosenTool(Strict):
    type: Literal["function"]
    function: ChosenFunction


class AnyFormat(Strict):
    type: Literal["text", "json_object"]


class NamedSchema(Strict):
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ChatRequest(Strict):
    """OpenAI's request. What is not here is refused, since the answer would not be what was asked for."""

    model: ModelReference
    messages: list[ChatMessage] = Field(min_length=1, max_length=10_000)
    temperature: float | None = Field(default=None, ge=0, le=2, description="0: the likeliest answer, always the same.")
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1, description="The newer name of it.")
    stop: str | list[str] | None = Field(default=None, max_length=1000)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[Tool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: AnyFormat | SchemaFormat | None = None
    user: str | None = Field(default=None, description="Not used.")
    metadata: dict[str, str] | None = Field(default=None, description="Not used.")
    store: Literal[False] | None = None

    @model_validator(mode="after")
    def fit_together(self) -> Self:
        if isinstance(self.tool_choice, ChosenTool) and not self._chosen_tools():
            raise ValueError(f"tool_choice names {self.tool_choice.function.name}, which is not among the tools")
        if self.tool_choice == "required" and not self.tools:
            raise ValueError("tool_choice required needs tools")
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is for answers with stream")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        if self.logprobs and self.stream and self.tools:
            raise ValueError("logprobs of a streamed answer that may call tools are not available")
        return self

    def for_engine(self) -> dict[str, Any]:
        wanted = self.model_dump(include=PASSED_ON, exclude_none=True, by_alias=True)
        wanted["messages"] = [message.for_engine() for message in self.messages]
        if longest := self.max_completion_tokens or self.max_tokens:
            wanted["max_tokens"] = longest
        if self.stop:
            wanted["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        if self.seed is not None:
            wanted["seed"] = self.seed % MOST_SEEDS
        if tools := self._chosen_tools():
            wanted["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
            # llama.cpp knows no names here, but can be made to call the only tool that it is shown.
            wanted["tool_choice"] = (
                "required" if isinstance(self.tool_choice, ChosenTool) else self.tool_choice or "auto"
            )
        return wanted

    def _chosen_tools(self) -> list[Tool]:
        tools = self.tools or []
        if not isinstance(self.tool_choice, ChosenTool):
            return tools
        return [tool for tool in tools if tool.function.name == self.tool_choice.function.name]


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = None


class ChatCompletion(BaseModel):
    id: str = Field(examples=["chatcmpl-3f0c"])
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Query(BaseModel):
    prompt: str = Field(min_length=1)
    model: ModelReference
    temperature: float | None = Field(default=None, ge=0, le=2)


class QueryAnswer(BaseModel):
    response: str
    model: str
    tokens_used: int


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
    meant = await _models(request).resolve(wanted.model)
    if wanted.stream:
        return await _stream(request, wanted, meant)
    answer = await _while_connected(
        request, _engine(request).complete(meant.reference, wanted.for_engine(), meant.version)
    )
    return Response(
        orjson.dumps({**_heading(wanted.model, "chat.completion"), **answer}), media_type="application/json"
    )


@router.post("/query")
async def query(request: Request, wanted: Query, caller: CurrentCaller) -> QueryAnswer:
    """Answer a single question."""
    meant = await _models(request).resolve(wanted.model)
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": wanted.prompt}]}
    if wanted.temperature is not None:
        asked["temperature"] = wanted.temperature
    answer = await _while_connected(request, _engine(request).complete(meant.reference, asked, meant.version))
    return QueryAnswer(
        response=answer["choices"][0]["message"]["content"] or "",
        model=wanted.model,
        tokens_used=answer["usage"]["total_tokens"],
    )


async def _stream(request: Request, wanted: ChatRequest, meant: Meant) -> Response:
    """The first words are waited for, because until then an error still has a status."""
    answer = _engine(request).chat(meant.reference, wanted.for_engine(), meant.version)
    first = await _while_connected(request, anext(answer))
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
    told = [chunk for chunk in chunks if chunk["choices"] or with_usage]
    return b"".join(_event(orjson.dumps({**heading, **chunk})) for chunk in told)


def _event(data: bytes | memoryview) -> bytes:
    return b"data: " + data + b"\n\n"


def _heading(model: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


async def _while_connected(request: Request, work: Awaitable[Answered]) -> Answered:
    """Do what a client waits for; when it goes away, stop. It gets no answer then, whatever is raised here."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
            await asyncio.wait([working])
        return working.result()
    except asyncio.CancelledError:
        working.cancel()
        raise
    finally:
        leaving.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _models(request: Request) -> Models:
    return request.app.state.models


def _engine(request: Request) -> Engine:
    return request.app.state.engine
