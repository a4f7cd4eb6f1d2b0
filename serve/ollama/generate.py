"""The routes /api/chat and /api/generate of Ollama's API."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from cluster.errors import ForgearrError
from cluster.ownership import Principal
from cluster.times import parse_duration
from serve.engines.collect import ChunkAccumulator
from serve.engines.protocol import Chunk
from serve.http.disconnect import cancel_on_disconnect
from serve.http.error_handlers import as_forgearr_error
from serve.models.dependencies import get_engine, get_models
from serve.ollama.keep_alive import apply_keep_alive, require_own, set_keep_alive
from serve.ollama.lines import (
    NDJSON,
    ChatFormatter,
    GenerateFormatter,
    Line,
    ResponseFormatter,
    add_chunks,
    done_reason,
    json_response,
    partial_lines,
    to_line,
    tool_calls_of,
)
from serve.ollama.schemas import ChatRequest, GenerateRequest
from serve.security.callers import CurrentCaller

router = APIRouter(prefix="/api")


@router.post("/chat")
async def chat(request: Request, body: ChatRequest, caller: CurrentCaller) -> Response:
    """Answer a chat. The response is streamed as lines of JSON, unless `stream` is false."""
    return await _respond(request, caller, body, ChatFormatter(body.model), is_empty=not body.messages)


@router.post("/generate")
async def generate(request: Request, body: GenerateRequest, caller: CurrentCaller) -> Response:
    """Answer a prompt. The response is streamed as lines of JSON, unless `stream` is false."""
    return await _respond(request, caller, body, GenerateFormatter(body.model), is_empty=not body.prompt)


async def _respond(
    request: Request,
    caller: Principal,
    body: ChatRequest | GenerateRequest,
    formatter: ResponseFormatter,
    *,
    is_empty: bool,
) -> Response:
    model = await get_models(request).resolve(body.model, caller)
    engine = get_engine(request)
    if is_empty:
        # In Ollama's API an empty request loads or unloads the model.
        should_unload = body.keep_alive is not None and parse_duration(body.keep_alive) == 0
        if should_unload:
            require_own(model, caller)
        else:
            await cancel_on_disconnect(request, engine.load(model.reference, model.source))
        await set_keep_alive(engine, model, body.keep_alive, caller)
        return json_response(formatter.empty_response("unload" if should_unload else "load"))
    stream = engine.chat(model.reference, body.for_engine(), model.source, model.account)
    keep_alive = partial(apply_keep_alive, engine, model, body.keep_alive, caller)
    # Until the first chunks arrive, an error can still set the status.
    first = await cancel_on_disconnect(request, anext(stream))
    if body.is_streamed:
        lines = _stream_lines(first, stream, formatter, keep_alive)
        return StreamingResponse(lines, media_type=NDJSON, headers={"X-Accel-Buffering": "no"})
    return json_response(await cancel_on_disconnect(request, _complete_response(first, stream, formatter, keep_alive)))


async def _complete_response(
    first: list[Chunk],
    chunks: AsyncGenerator[list[Chunk]],
    formatter: ResponseFormatter,
    keep_alive: Callable[[], Awaitable[None]],
) -> Line:
    accumulator = ChunkAccumulator()
    async with aclosing(chunks):
        add_chunks(accumulator, first)
        async for batch in chunks:
            add_chunks(accumulator, batch)
    result = accumulator.result()
    (choice,) = result["choices"]
    message = choice.get("message", {})
    fields = formatter.content_fields(
        choice.get("text", message.get("content") or ""), message.get("reasoning_content"), tool_calls_of(message)
    )
    if choice["logprobs"]:
        fields["logprobs"] = choice["logprobs"]["content"]
    await keep_alive()
    return formatter.final_line(done_reason(choice), result, **fields)


async def _stream_lines(
    first: list[Chunk],
    chunks: AsyncGenerator[list[Chunk]],
    formatter: ResponseFormatter,
    keep_alive: Callable[[], Awaitable[None]],
) -> AsyncGenerator[bytes]:
    accumulator = ChunkAccumulator()
    async with aclosing(chunks):
        try:
            yield partial_lines(accumulator, first, formatter)
            async for batch in chunks:
                yield partial_lines(accumulator, batch, formatter)
        except ForgearrError as error:
            yield to_line({"error": as_forgearr_error(error).message})
            return
    await keep_alive()
    result = accumulator.result()
    (choice,) = result["choices"]
    calls = tool_calls_of(choice.get("message", {}))
    if calls:
        yield to_line(formatter.line(**formatter.content_fields("", None, calls)))
    yield to_line(formatter.final_line(done_reason(choice), result, **formatter.content_fields("", None)))
