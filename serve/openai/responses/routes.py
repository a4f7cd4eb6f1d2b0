"""The routes /v1/responses of OpenAI's API: conversations that the server stores."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from cluster.db import Database, get_database
from cluster.errors import ForgearrError, InvalidRequest
from cluster.identity import account_limits
from cluster.ownership import Principal
from serve.engines.protocol import Chunk, Engine
from serve.engines.protocol import EngineRequest as EngineRequest
from serve.http import sse
from serve.http.disconnect import cancel_on_disconnect
from serve.http.error_handlers import as_forgearr_error
from serve.http.pagination import CursorPage, cursor_page, slice_after
from serve.models.dependencies import get_engine, get_models
from serve.models.resolver import ResolvedModel
from serve.openai import streaming
from serve.openai.responses import schemas as schemas
from serve.openai.responses import store as response_store
from serve.openai.responses.conversation import check_calls
from serve.openai.responses.events import Event, ResponseStream, new_response_id
from serve.openai.responses.items import Item
from serve.openai.responses.request import ResponseRequest
from serve.openai.responses.schemas import DeletedResponse
from serve.security.callers import CurrentCaller

router = APIRouter(prefix="/v1/responses")

SaveResponse = Callable[[dict[str, Any]], Awaitable[None]]
ResponseId = Annotated[str, Field(max_length=100)]

log = logging.getLogger(__name__)
_save_tasks: set[asyncio.Task[None]] = set()


class NotInBackground(InvalidRequest):
    """Background responses are not supported, so none can be cancelled. Close the connection instead."""

    code = "NOT_IN_BACKGROUND"


class CannotContinue(InvalidRequest):
    """The events of a response are not stored: its stream can only be repeated whole, without starting_after."""

    code = "CANNOT_START_AFTER"


@router.post("", response_model=schemas.Response, responses=sse.sse_responses("event of a response"))
async def create_response(request: Request, body: ResponseRequest, caller: CurrentCaller) -> Any:
    """Create a response, and store it. With `stream`, the response is a stream of server-sent events."""
    model = await get_models(request).resolve(body.model, caller)
    if not body.stream:
        awaitable = complete_response(get_database(), get_engine(request), model, body, caller)
        return Response(orjson.dumps(await cancel_on_disconnect(request, awaitable)), media_type="application/json")
    prepared = await _prepare(get_database(), body, caller)
    stream = get_engine(request).chat(model.reference, prepared.engine_request, model.source, model.account)
    first = await cancel_on_disconnect(request, anext(stream))
    save = partial(_save, get_database(), prepared.input_items, caller)
    return _sse_response(_stream_events(prepared.response_stream, streaming.prepend(first, stream), save))


async def complete_response(
    database: Database, engine: Engine, model: ResolvedModel, body: ResponseRequest, principal: Principal
) -> dict[str, Any]:
    """Create a response without streaming, and store it if the request says so."""
    prepared = await _prepare(database, body, principal)
    prepared.response_stream.feed(
        _as_chunk(await engine.complete(model.reference, prepared.engine_request, model.source, model.account))
    )
    prepared.response_stream.end()
    await _save(database, prepared.input_items, principal, prepared.response_stream.response)
    return prepared.response_stream.response


@router.get("/{response_id}", response_model=schemas.Response, responses=sse.sse_responses("event of a response"))
async def show_response(
    response_id: ResponseId,
    caller: CurrentCaller,
    stream: bool = False,
    starting_after: Annotated[int | None, Query(ge=0, description="Not supported.")] = None,
) -> Any:
    """Get a stored response. With `stream`, its events are sent again."""
    if starting_after is not None:
        raise CannotContinue()
    async with get_database().read_transaction() as session:
        stored = await response_store.find(session, response_id, caller)
    if not stream:
        return Response(orjson.dumps(stored.body), media_type="application/json")

    async def replay_events() -> AsyncGenerator[list[Event]]:
        initial_fields = {
            "status": "in_progress",
            "output": [],
            "usage": None,
            "completed_at": None,
            "incomplete_details": None,
        }
        yield ResponseStream(response_id, {**stored.body, **initial_fields, "error": None}).replay(stored.body)

    return _sse_response(replay_events())


@router.delete("/{response_id}")
async def delete_response(response_id: ResponseId, caller: CurrentCaller) -> DeletedResponse:
    """Delete a stored response. Responses that continue it can no longer be continued."""
    async with get_database().transaction() as session:
        await response_store.remove(session, response_id, caller)
    return DeletedResponse(id=response_id)


@router.post("/{response_id}/cancel", response_model=schemas.Response)
async def cancel_response(response_id: ResponseId, caller: CurrentCaller) -> Any:
    """Not supported: a response is cancelled when its client closes the connection."""
    async with get_database().read_transaction() as session:
        await response_store.find(session, response_id, caller)
    raise NotInBackground()


@router.get("/{response_id}/input_items")
async def list_input_items(
    response_id: ResponseId,
    caller: CurrentCaller,
    after: Annotated[str | None, Query(max_length=100, description="The last item of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> CursorPage[dict[str, Any]]:
    """List the input items of a response, including the conversation before it."""
    async with get_database().read_transaction() as session:
        items = await response_store.input_items_of(session, response_id, caller)
    if order == "desc":
        items.reverse()
    missing = response_store.ItemNotFound(f"There is no item '{after}' in the input of this response.")
    found = slice_after(items, after, limit, missing, itemgetter("id"))
    return cursor_page(found.items, found.has_more, itemgetter("id"))


@dataclass(frozen=True)
class _PreparedRequest:
    response_stream: ResponseStream
    engine_request: EngineRequest
    input_items: list[Item]


async def _prepare(database: Database, body: ResponseRequest, principal: Principal) -> _PreparedRequest:
    response_id = new_response_id()
    previous_items, referenced_items = await _load_context(database, body, principal)
    input_items = body.items(response_id, referenced_items)
    items = [*previous_items, *input_items]
    check_calls(items)
    return _PreparedRequest(
        ResponseStream(response_id, body.request_fields(), len(input_items)), body.for_engine(items), input_items
    )


async def _load_context(
    database: Database, body: ResponseRequest, principal: Principal
) -> tuple[list[Item], dict[str, Item]]:
    """Load what a request refers to: the previous conversation, and stored items by their ids.

    If the response is to be stored, the account must have room for it: there is none to ask for once it is created.
    """
    previous_id, references = body.previous_response_id, body.references
    if previous_id is None and not references and not body.is_stored:
        return [], {}
    async with database.read_transaction() as session:
        if body.is_stored:
            await account_limits.require_any_room(session, principal, "responses_mb")
        previous_items = (
            await response_store.conversation_until(session, previous_id, principal) if previous_id is not None else []
        )
        return previous_items, {
            reference: await response_store.find_item(session, reference, principal) for reference in references
        }


async def _save(database: Database, input_items: list[Item], principal: Principal, body: dict[str, Any]) -> None:
    if body["store"]:
        await response_store.store(database, body, input_items, principal)


async def _stream_events(
    response_stream: ResponseStream, engine_stream: AsyncGenerator[list[Chunk]], save: SaveResponse
) -> AsyncGenerator[list[Event]]:
    """The events of a response. It is stored before the last event, so that the client can continue it at once."""
    async with aclosing(engine_stream):
        try:
            yield response_stream.begin()
            async for chunks in engine_stream:
                yield [event for chunk in chunks for event in response_stream.feed(chunk)]
            last = response_stream.end()
        except ForgearrError as error:
            last = response_stream.fail(error)
        except (asyncio.CancelledError, GeneratorExit):
            response_stream.cancel()
            _run_detached(save(response_stream.response))
            raise
    try:
        await asyncio.shield(_run_detached(save(response_stream.response)))
    except Exception as error:
        log.exception("The response %s could not be stored.", response_stream.response["id"])
        last = [response_stream.error_event(as_forgearr_error(error))]
    yield last


def _run_detached(awaitable: Awaitable[None]) -> asyncio.Task[None]:
    """Run to the end, even if the request is cancelled because its client disconnects."""
    task = asyncio.ensure_future(awaitable)
    _save_tasks.add(task)
    task.add_done_callback(_on_saved)
    return task


def _on_saved(task: asyncio.Task[None]) -> None:
    _save_tasks.discard(task)
    if not task.cancelled() and (error := task.exception()):
        log.error("The response of a disconnected client could not be stored.", exc_info=error)


def _as_chunk(completion: dict[str, Any]) -> Chunk:
    """Convert a completion into one chunk of a stream."""
    (choice,) = completion["choices"]
    message = choice["message"]
    calls = [{"index": index, **call} for index, call in enumerate(message.get("tool_calls") or [])]
    return {**completion, "choices": [{**choice, "delta": {**message, "tool_calls": calls}}]}


def _sse_response(batches: AsyncGenerator[list[Event]]) -> Response:
    async def serialized() -> AsyncGenerator[bytes]:
        async with aclosing(batches):
            async for events in batches:
                if events:
                    yield b"".join(_serialize(events))

    return sse.sse_response(serialized())


def _serialize(events: Iterable[Event]) -> Iterable[bytes]:
    return (b"event: %s\n%s" % (event["type"].encode(), sse.event(orjson.dumps(event))) for event in events)
