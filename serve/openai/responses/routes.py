"""/v1/responses, as OpenAI has it: conversations that the server remembers."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from cluster.db import Database, get_database
from cluster.errors import ForgearrError, InvalidRequest
from cluster.ownership import Owner
from serve.engines.protocol import Chunk, Engine
from serve.engines.protocol import Request as EngineRequest
from serve.http import sse
from serve.http.disconnect import while_connected
from serve.http.error_handlers import as_forgearr_error
from serve.http.errors import OPENAI_ERROR_RESPONSES
from serve.http.pagination import CursorPage, cursor_page
from serve.models.dependencies import engine_of, models_of
from serve.models.resolver import Meant
from serve.openai import streaming
from serve.openai.responses import schemas as bodies
from serve.openai.responses import store as response_store
from serve.openai.responses.conversation import check_calls
from serve.openai.responses.events import Event, Telling, new_response_id
from serve.openai.responses.items import Item
from serve.openai.responses.request import ResponseRequest
from serve.openai.responses.schemas import DeletedResponse
from serve.security.callers import CurrentCaller, owner_of

router = APIRouter(prefix="/v1/responses", tags=["Responses"], responses=OPENAI_ERROR_RESPONSES)

Keep = Callable[[dict[str, Any]], Awaitable[None]]
ResponseId = Annotated[str, Field(max_length=100)]

log = logging.getLogger(__name__)
_keeping: set[asyncio.Task[None]] = set()


class NotInBackground(InvalidRequest):
    """Only a response with background=true can be cancelled, and there are none here: close the connection instead."""

    code = "NOT_IN_BACKGROUND"


class CannotContinue(InvalidRequest):
    """The single events of a response are not kept: it can be told again from its beginning, without starting_after."""

    code = "CANNOT_START_AFTER"


@router.post("", response_model=bodies.Response, responses=sse.described("event of a response"))
async def create_response(request: Request, wanted: ResponseRequest, caller: CurrentCaller) -> Any:
    """Answer a conversation, whole or as server-sent events, and keep the response."""
    owner = owner_of(caller)
    meant = await models_of(request).resolve(wanted.model, owner)
    if not wanted.stream:
        work = answer_response(get_database(), engine_of(request), meant, wanted, owner)
        return Response(orjson.dumps(await while_connected(request, work)), media_type="application/json")
    asked = await _asked(get_database(), wanted, owner)
    answer = engine_of(request).chat(meant.reference, asked.request, meant.source)
    first = await while_connected(request, anext(answer))
    keep = partial(_keep, get_database(), asked.given, owner)
    return _stream(_told(asked.telling, streaming.rejoined(first, answer), keep))


async def answer_response(
    database: Database, engine: Engine, meant: Meant, wanted: ResponseRequest, owner: Owner
) -> dict[str, Any]:
    """The whole response, which is kept if that is wanted."""
    asked = await _asked(database, wanted, owner)
    asked.telling.hear(_as_chunk(await engine.complete(meant.reference, asked.request, meant.source)))
    asked.telling.end()
    await _keep(database, asked.given, owner, asked.telling.response)
    return asked.telling.response


@router.get("/{response_id}", response_model=bodies.Response, responses=sse.described("event of a response"))
async def show_response(
    response_id: ResponseId,
    caller: CurrentCaller,
    stream: bool = False,
    starting_after: Annotated[int | None, Query(ge=0, description="Refused.")] = None,
) -> Any:
    """A response that was kept; with `stream`, as the events that tell of it."""
    if starting_after is not None:
        raise CannotContinue()
    async with get_database().reading() as session:
        stored = await response_store.find(session, response_id, owner_of(caller))
    if not stream:
        return Response(orjson.dumps(stored.body), media_type="application/json")

    async def again() -> AsyncGenerator[list[Event]]:
        begun = {"status": "in_progress", "output": [], "usage": None, "completed_at": None, "incomplete_details": None}
        yield Telling(response_id, {**stored.body, **begun, "error": None}).tell_again(stored.body)

    return _stream(again())


@router.delete("/{response_id}")
async def delete_response(response_id: ResponseId, caller: CurrentCaller) -> DeletedResponse:
    """Delete it. What goes on from it cannot be gone on from any more."""
    async with get_database().transaction() as session:
        await response_store.remove(session, response_id, owner_of(caller))
    return DeletedResponse(id=response_id)


@router.post("/{response_id}/cancel", response_model=bodies.Response)
async def cancel_response(response_id: ResponseId, caller: CurrentCaller) -> Any:
    """Refused: a response ends when whoever waits for it closes the connection."""
    async with get_database().reading() as session:
        await response_store.find(session, response_id, owner_of(caller))
    raise NotInBackground()


@router.get("/{response_id}/input_items")
async def list_input_items(
    response_id: ResponseId,
    caller: CurrentCaller,
    after: Annotated[str | None, Query(max_length=100, description="The item before the page.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> CursorPage[dict[str, Any]]:
    """What it was an answer to, with the conversation before."""
    async with get_database().reading() as session:
        items = await response_store.given_to(session, response_id, owner_of(caller))
    if order == "desc":
        items.reverse()
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise response_store.ItemNotFound(f"There is no item '{after}' among those that were given.")
        items = items[ids.index(after) + 1 :]
    page = items[: limit + 1]
    return cursor_page(page, [item["id"] for item in page], limit)


@dataclass(frozen=True)
class _Asked:
    telling: Telling
    request: EngineRequest
    given: list[Item]


async def _asked(database: Database, wanted: ResponseRequest, owner: Owner) -> _Asked:
    response_id = new_response_id()
    before, referred = await _known(database, wanted, owner)
    given = wanted.items(response_id, referred)
    items = [*before, *given]
    check_calls(items)
    return _Asked(Telling(response_id, wanted.repeated(), len(given)), wanted.for_engine(items), given)


async def _known(database: Database, wanted: ResponseRequest, owner: Owner) -> tuple[list[Item], dict[str, Item]]:
    """What a request only names: the conversation before it, and items by their ids."""
    previous, references = wanted.previous_response_id, wanted.references
    if previous is None and not references:
        return [], {}
    async with database.reading() as session:
        before = await response_store.said_before(session, previous, owner) if previous is not None else []
        return before, {one: await response_store.find_item(session, one, owner) for one in references}


async def _keep(database: Database, given: list[Item], owner: Owner, body: dict[str, Any]) -> None:
    if body["store"]:
        await response_store.keep(database, body, given, owner)


async def _told(telling: Telling, answer: AsyncGenerator[list[Chunk]], keep: Keep) -> AsyncGenerator[list[Event]]:
    """The events of an answer. It is kept before the last of them, so that one can go on from it at once."""
    async with aclosing(answer):
        try:
            yield telling.begin()
            async for chunks in answer:
                yield [event for chunk in chunks for event in telling.hear(chunk)]
            last = telling.end()
        except ForgearrError as error:
            last = telling.fail(error)
        except (asyncio.CancelledError, GeneratorExit):
            telling.leave()
            _apart(keep(telling.response))
            raise
    try:
        await asyncio.shield(_apart(keep(telling.response)))
    except Exception as error:
        log.exception("%s cannot be kept.", telling.response["id"])
        last = [telling.refuse(as_forgearr_error(error))]
    yield last


def _apart(keeping: Awaitable[None]) -> asyncio.Task[None]:
    """Done to its end also when the request is over, whose own work is cancelled when the client goes away."""
    task = asyncio.ensure_future(keeping)
    _keeping.add(task)
    task.add_done_callback(_settle)
    return task


def _settle(task: asyncio.Task[None]) -> None:
    _keeping.discard(task)
    if not task.cancelled() and (error := task.exception()):
        log.error("A response that nobody waits for cannot be kept.", exc_info=error)


def _as_chunk(answer: dict[str, Any]) -> Chunk:
    """A whole answer as one chunk of a streamed one."""
    (choice,) = answer["choices"]
    message = choice["message"]
    calls = [{"index": index, **call} for index, call in enumerate(message.get("tool_calls") or [])]
    return {**answer, "choices": [{**choice, "delta": {**message, "tool_calls": calls}}]}


def _stream(told: AsyncGenerator[list[Event]]) -> Response:
    async def written() -> AsyncGenerator[bytes]:
        async with aclosing(told):
            async for events in told:
                if events:
                    yield b"".join(_written(events))

    return sse.streamed(written())


def _written(events: Iterable[Event]) -> Iterable[bytes]:
    return (b"event: %s\n%s" % (event["type"].encode(), sse.event(orjson.dumps(event))) for event in events)
