"""The routes of a job's journal and log: read them in pages, or follow them as server-sent events."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from cluster.db import get_database, is_transient
from cluster.ownership import Principal
from cluster.times import UtcTime
from jobs import journal, queue
from jobs.states import FINISHED
from jobs.tables import Job, JobEvent
from serve.http.errors import Responses
from serve.jobs.routes import JobId
from serve.security.callers import CurrentCaller, is_still_authorized

router = APIRouter(prefix="/api/v1/jobs")

LastEventId = Annotated[Annotated[str, Field(pattern=r"^\d{0,15}$")] | SkipJsonSchema[None], Header()]

RETRY_SECONDS = 1.0
"""After this time a followed stream asks a database again that did not respond."""
HEARTBEAT_SECONDS = 5.0
"""After this time without a live message, a followed stream checks its credential, reads the database and sends a
comment."""


class EventView(BaseModel):
    id: int
    type: str
    data: dict[str, Any]
    created_at: UtcTime


class EventPage(BaseModel):
    items: list[EventView]
    next_after: int | None = Field(description="Send it as `after` for the next page. Null: there is none yet.")


class LogLine(BaseModel):
    id: int
    timestamp: UtcTime
    level: str
    message: str


class LogPage(BaseModel):
    items: list[LogLine]
    next_after: int | None


def _stream_responses(view_class: type[BaseModel]) -> Responses:
    """The responses in OpenAPI of a route that can also be followed."""
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"$ref": f"#/components/schemas/{view_class.__name__}"},
    }
    event = {
        "type": "object",
        "properties": {"id": {"type": "string"}, "event": {"type": "string"}, "data": data},
        "required": ["id", "event", "data"],
    }
    return {
        200: {"content": {"text/event-stream": {"itemSchema": event}}},
        204: {"description": "No more events: the job has finished."},
    }


class JournalQuery:
    def __init__(
        self,
        after: Annotated[int, Query(ge=0, le=2**53, description="Only entries after the one with this id.")] = 0,
        limit: Annotated[int, Query(ge=1, le=500)] = 100,
        follow: Annotated[bool, Query(description="Stream server-sent events until the job has finished.")] = False,
        last_event_id: LastEventId = None,
    ) -> None:
        self.after = int(last_event_id or after)
        self.limit = limit
        self.follow = follow


JournalParams = Annotated[JournalQuery, Depends()]


@router.get("/{job_id}/events", response_model=EventPage, responses=_stream_responses(EventView))
async def job_events(request: Request, job_id: JobId, caller: CurrentCaller, query: JournalParams) -> Any:
    """List or follow the journal of a job: state changes, progress, checkpoints and log lines."""
    job, page = await _read_page(job_id, caller, query, event_type=None)
    if query.follow:
        return _follow_response(request, job, page, query.after, event_type=None)
    return EventPage(items=[_event(event) for event in page], next_after=page[-1].id if page else None)


@router.get("/{job_id}/logs", response_model=LogPage, responses=_stream_responses(LogLine))
async def job_logs(request: Request, job_id: JobId, caller: CurrentCaller, query: JournalParams) -> Any:
    """List or follow the log lines of a job."""
    job, page = await _read_page(job_id, caller, query, event_type="log")
    if query.follow:
        return _follow_response(request, job, page, query.after, event_type="log")
    return LogPage(items=[_log_line(event) for event in page], next_after=page[-1].id if page else None)


async def _read_page(
    job_id: str, caller: Principal, query: JournalQuery, event_type: str | None
) -> tuple[Job, list[JobEvent]]:
    async with get_database().read_transaction() as session:
        job = await queue.get(session, job_id, caller)
        return job, await journal.read(session, job_id, query.after, query.limit, event_type)


def _follow_response(request: Request, job: Job, page: list[JobEvent], after: int, event_type: str | None) -> Response:
    if not page and job.state in FINISHED:
        return Response(status_code=204)  # an EventSource does not reconnect after it
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    stream = _stream_journal(request, job.id, after, event_type)
    return StreamingResponse(stream, media_type="text/event-stream", headers=headers)


async def _stream_journal(request: Request, job_id: str, after: int, event_type: str | None) -> AsyncIterator[str]:
    """Stream the journal after the entry `after`, and new entries, until the job has finished."""
    to_view = _log_line if event_type == "log" else _event
    async with request.app.state.hub.subscribe({f"job:{job_id}"}) as subscription:
        while await is_still_authorized(request):
            try:
                state, page = await _read_news(job_id, after, event_type)
            except SQLAlchemyError as error:
                if not is_transient(error):
                    raise
                yield ": the database does not respond; this stream goes on when it does\n\n"
                await asyncio.sleep(RETRY_SECONDS)
                continue
            for event in page:
                after = event.id
                yield f"id: {event.id}\nevent: {event.type}\ndata: {to_view(event).model_dump_json()}\n\n"
            if page:
                continue
            if state is None or state in FINISHED:
                return
            if await subscription.get(HEARTBEAT_SECONDS) is None:
                if subscription.dropped:
                    return  # the client reads too slowly; it may reconnect with its Last-Event-ID
                yield ": still here\n\n"


async def _read_news(job_id: str, after: int, event_type: str | None) -> tuple[str | None, list[JobEvent]]:
    async with get_database().read_transaction() as session:
        state = await session.scalar(select(Job.state).where(Job.id == job_id))
        return state, await journal.read(session, job_id, after, event_type=event_type)


def _event(event: JobEvent) -> EventView:
    return EventView(id=event.id, type=event.type, data=event.data, created_at=event.created_at)


def _log_line(event: JobEvent) -> LogLine:
    return LogLine(id=event.id, timestamp=event.created_at, level=event.data["level"], message=event.data["message"])
