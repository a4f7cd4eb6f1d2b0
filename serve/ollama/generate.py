"""/api/chat and /api/generate, as Ollama has them, with the same models as behind /v1."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from cluster.errors import ForgearrError
from cluster.times import seconds_of
from serve.engines.collect import Answer
from serve.engines.protocol import Chunk, Engine
from serve.http.disconnect import while_connected
from serve.http.error_handlers import as_forgearr_error
from serve.models.dependencies import engine_of, models_of
from serve.models.resolver import Meant
from serve.ollama.keep_alive import keep
from serve.ollama.lines import (
    NDJSON,
    ChatTeller,
    GenerateTeller,
    Line,
    Teller,
    add_chunks,
    done_reason,
    json_response,
    partial_lines,
    to_line,
    tool_calls_of,
)
from serve.ollama.schemas import Asked, ChatRequest, GenerateRequest
from serve.security.callers import Caller, CurrentCaller, owner_of

router = APIRouter(prefix="/api", tags=["Ollama"])


@router.post("/chat")
async def chat(request: Request, wanted: ChatRequest, caller: CurrentCaller) -> Response:
    """Answer a conversation: line by line, or whole."""
    return await _answer(request, caller, wanted, ChatTeller(wanted.model), is_empty=not wanted.messages)


@router.post("/generate")
async def generate(request: Request, wanted: GenerateRequest, caller: CurrentCaller) -> Response:
    """Answer a prompt: line by line, or whole."""
    return await _answer(request, caller, wanted, GenerateTeller(wanted.model), is_empty=not wanted.prompt)


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
        return json_response(teller.silence("unload" if is_leaving else "load"))
    answer = engine.chat(meant.reference, wanted.for_engine(), meant.source)
    # The first words are waited for, because until then an error still has a status.
    first = await while_connected(request, anext(answer))
    if wanted.is_streamed:
        lines = _lines(first, answer, teller, engine, wanted, meant)
        return StreamingResponse(lines, media_type=NDJSON, headers={"X-Accel-Buffering": "no"})
    return json_response(await while_connected(request, _whole(first, answer, teller, engine, wanted, meant)))


async def _whole(
    first: list[Chunk], chunks: AsyncGenerator[list[Chunk]], teller: Teller, engine: Engine, wanted: Asked, meant: Meant
) -> Line:
    answer = Answer()
    async with aclosing(chunks):
        add_chunks(answer, first)
        async for told in chunks:
            add_chunks(answer, told)
    whole = answer.whole()
    (choice,) = whole["choices"]
    message = choice.get("message", {})
    said = teller.part(
        choice.get("text", message.get("content") or ""), message.get("reasoning_content"), tool_calls_of(message)
    )
    if choice["logprobs"]:
        said["logprobs"] = choice["logprobs"]["content"]
    await keep(engine, meant, wanted.keep_alive)
    return teller.last(done_reason(choice), whole, **said)


async def _lines(
    first: list[Chunk], chunks: AsyncGenerator[list[Chunk]], teller: Teller, engine: Engine, wanted: Asked, meant: Meant
) -> AsyncGenerator[bytes]:
    answer = Answer()
    async with aclosing(chunks):
        try:
            yield partial_lines(answer, first, teller)
            async for told in chunks:
                yield partial_lines(answer, told, teller)
        except ForgearrError as error:
            yield to_line({"error": as_forgearr_error(error).message})
            return
    await keep(engine, meant, wanted.keep_alive)
    whole = answer.whole()
    (choice,) = whole["choices"]
    calls = tool_calls_of(choice.get("message", {}))
    if calls:
        yield to_line(teller.line(**teller.part("", None, calls)))
    yield to_line(teller.last(done_reason(choice), whole, **teller.part("", None)))
