"""/api/chat and /api/generate, as Ollama has them, with the same models as behind /v1."""

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import UTC, datetime
from time import perf_counter_ns
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from cluster.errors import ForgearrError
from cluster.times import seconds_of
from serve.answering import engine_of, models_of, while_connected
from serve.api.jobs import owner_of
from serve.auth import Caller, CurrentCaller
from serve.bodies.ollama import Asked, ChatRequest, GenerateRequest
from serve.engines.answers import Answer
from serve.engines.protocol import Chunk, Engine
from serve.envelope import as_forgearr_error
from serve.models import Meant

log = logging.getLogger(__name__)
router = APIRouter(prefix="/api", tags=["Ollama"])

NDJSON = "application/x-ndjson"
MILLISECOND = 1_000_000  # Ollama counts in nanoseconds

Line = dict[str, Any]


@router.post("/chat")
async def chat(request: Request, wanted: ChatRequest, caller: CurrentCaller) -> Response:
    """Answer a conversation: line by line, or whole."""
    return await _answer(request, caller, wanted, ChatTeller(wanted.model), is_empty=not wanted.messages)


@router.post("/generate")
async def generate(request: Request, wanted: GenerateRequest, caller: CurrentCaller) -> Response:
    """Answer a prompt: line by line, or whole."""
    return await _answer(request, caller, wanted, GenerateTeller(wanted.model), is_empty=not wanted.prompt)


class Teller:
    """An answer in Ollama's words."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._began = perf_counter_ns()

    def line(self, **said: Any) -> Line:
        return {"model": self._model, "created_at": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}", **said, "done": False}

    def last(self, reason: str, answer: Line | None = None, **said: Any) -> Line:
        """The line that ends an answer, with what it has cost."""
        ended: Line = {**self.line(**said), "done": True, "done_reason": reason}
        ended["total_duration"] = perf_counter_ns() - self._began
        if answer is not None:
            usage, timings = answer["usage"], answer["timings"]
            ended |= {
                "load_duration": int(timings["load_ms"] * MILLISECOND),
                "prompt_eval_count": usage["prompt_tokens"],
                "prompt_eval_duration": int(timings["prompt_ms"] * MILLISECOND),
                "eval_count": usage["completion_tokens"],
                "eval_duration": int(timings["predicted_ms"] * MILLISECOND),
            }
        return ended

    def silence(self, reason: str) -> Line:
        """The only line of an answer to nothing."""
        return self.last(reason, **self.part("", None))

    def part(self, content: str, thinking: str | None, calls: list[Line] | None = None) -> Line:
        raise NotImplementedError


class ChatTeller(Teller):
    def part(self, content: str, thinking: str | None, calls: list[Line] | None = None) -> Line:
        said = {"role": "assistant", "content": content, "thinking": thinking, "tool_calls": calls}
        return {"message": {name: value for name, value in said.items() if value is not None}}


class GenerateTeller(Teller):
    def part(self, content: str, thinking: str | None, calls: list[Line] | None = None) -> Line:
        return {"response": content, **({} if thinking is None else {"thinking": thinking})}


async def _answer(
    request: Request, caller: Caller, wanted: ChatRequest | GenerateRequest, teller: Teller, *, is_empty: bool
) -> Response:
    meant = await models_of(request).resolve(wanted.model, owner_of(caller))
    engine = engine_of(request)
    if is_empty:
        # So Ollama is told to load a model, or to let it go.
        is_leaving = wanted.keep_alive is not None and seconds_of(wanted.keep_alive) == 0
        if not is_leaving:
            await while_connected(request, engine.load(meant.reference, meant.source))
        if wanted.keep_alive is not None:
            await engine.keep(meant.reference, seconds_of(wanted.keep_alive), meant.source)
        return _json(teller.silence("unload" if is_leaving else "load"))
    answer = engine.chat(meant.reference, wanted.for_engine(), meant.source)
    # The first words are waited for, because until then an error still has a status.
    first = await while_connected(request, anext(answer))
    if wanted.is_streamed:
        lines = _lines(first, answer, teller, engine, wanted, meant)
        return StreamingResponse(lines, media_type=NDJSON, headers={"X-Accel-Buffering": "no"})
    return _json(await while_connected(request, _whole(first, answer, teller, engine, wanted, meant)))


async def keep(engine: Engine, meant: Meant, keep_alive: float | str | None) -> None:
    """Let a model that has answered stay as long as its client says. The answer is there, whatever comes of it."""
    if keep_alive is None:
        return
    try:
        await engine.keep(meant.reference, seconds_of(keep_alive), meant.source)
    except ForgearrError as error:
        log.warning("%s may not stay as long as somebody has said: %s", meant.reference, error.message)


async def _whole(
    first: list[Chunk], chunks: AsyncGenerator[list[Chunk]], teller: Teller, engine: Engine, wanted: Asked, meant: Meant
) -> Line:
    answer = Answer()
    async with aclosing(chunks):
        _hear(answer, first)
        async for told in chunks:
            _hear(answer, told)
    whole = answer.whole()
    (choice,) = whole["choices"]
    message = choice.get("message", {})
    said = teller.part(
        choice.get("text", message.get("content") or ""), message.get("reasoning_content"), _calls(message)
    )
    if choice["logprobs"]:
        said["logprobs"] = choice["logprobs"]["content"]
    await keep(engine, meant, wanted.keep_alive)
    return teller.last(_reason(choice), whole, **said)


async def _lines(
    first: list[Chunk], chunks: AsyncGenerator[list[Chunk]], teller: Teller, engine: Engine, wanted: Asked, meant: Meant
) -> AsyncGenerator[bytes]:
    answer = Answer()
    async with aclosing(chunks):
        try:
            yield _parts(answer, first, teller)
            async for told in chunks:
                yield _parts(answer, told, teller)
        except ForgearrError as error:
            yield _line({"error": as_forgearr_error(error).message})
            return
    await keep(engine, meant, wanted.keep_alive)
    whole = answer.whole()
    (choice,) = whole["choices"]
    calls = _calls(choice.get("message", {}))
    if calls:
        yield _line(teller.line(**teller.part("", None, calls)))
    yield _line(teller.last(_reason(choice), whole, **teller.part("", None)))


def _parts(answer: Answer, chunks: list[Chunk], teller: Teller) -> bytes:
    """What is said now. A call comes only when it is whole: so Ollama tells it."""
    _hear(answer, chunks)
    lines: list[bytes] = []
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice.get("delta", {})
            content, thinking = choice.get("text", delta.get("content")), delta.get("reasoning_content")
            if content or thinking:
                heard = teller.part(content or "", thinking)
                if choice.get("logprobs"):
                    heard["logprobs"] = choice["logprobs"]["content"]
                lines.append(_line(teller.line(**heard)))
    return b"".join(lines)


def _hear(answer: Answer, chunks: list[Chunk]) -> None:
    for chunk in chunks:
        answer.hear(chunk)


def _calls(message: dict[str, Any]) -> list[Line] | None:
    """Ollama's arguments are an object; a model that was cut off may have written half of one."""
    calls = [call["function"] for call in message.get("tool_calls", [])]
    whole = [(call["name"], _object(call["arguments"])) for call in calls]
    return [{"function": {"name": name, "arguments": said}} for name, said in whole if said is not None] or None


def _object(arguments: str) -> dict[str, Any] | None:
    try:
        return orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return None


def _reason(choice: dict[str, Any]) -> str:
    return "length" if choice["finish_reason"] == "length" else "stop"


def _json(line: Line) -> Response:
    return Response(orjson.dumps(line), media_type="application/json")


def _line(line: Line) -> bytes:
    return orjson.dumps(line) + b"\n"
