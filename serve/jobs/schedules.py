"""The routes /api/v1/schedules: schedules, which queue jobs at the times of a cron line."""

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, Field
from sqlalchemy import select

from cluster.db import get_database
from cluster.ownership import visible
from cluster.times import UtcTime
from jobs import schedules
from jobs.schedules import ScheduleRequest
from jobs.tables import Schedule
from serve.http.long_values import ShortValues, read_short_values, truncated_field, without
from serve.http.pagination import Page, PaginationParams
from serve.security.callers import CurrentCaller

router = APIRouter(prefix="/api/v1/schedules")

ScheduleId = Annotated[str, Field(max_length=36)]


class ScheduleView(BaseModel):
    id: str
    name: str
    kind: str
    spec: dict[str, Any]
    cron: str
    timezone: str
    priority: int
    enabled: bool
    next_fire_at: UtcTime | None
    last_fire_at: UtcTime | None
    last_job_id: str | None
    created_by: str
    created_at: UtcTime
    updated_at: UtcTime
    truncated: list[str] = truncated_field()


@router.post("", status_code=201)
async def create_schedule(body: ScheduleRequest, caller: CurrentCaller) -> ScheduleView:
    async with get_database().transaction() as session:
        return _view(await schedules.create(session, body, caller))


@router.get("")
async def list_schedules(caller: CurrentCaller, paging: PaginationParams) -> Page[ScheduleView]:
    """List schedules by name. Long specs are left out."""
    query = visible(select(Schedule), Schedule, caller).options(*without(Schedule.spec))
    async with get_database().read_transaction() as session:
        rows = await paging.read(session, query.order_by(Schedule.name))
        ids = [schedule.id for schedule in rows.items]
        short = await read_short_values(session, Schedule.id, [Schedule.spec], ids)
        return paging.page([_view(schedule, short[schedule.id]) for schedule in rows.items], rows.total)


@router.get("/{schedule_id}")
async def show_schedule(schedule_id: ScheduleId, caller: CurrentCaller) -> ScheduleView:
    async with get_database().read_transaction() as session:
        return _view(await schedules.get(session, schedule_id, caller))


@router.put("/{schedule_id}")
async def replace_schedule(schedule_id: ScheduleId, body: ScheduleRequest, caller: CurrentCaller) -> ScheduleView:
    """Replace all fields of a schedule. Its next fire time is computed again."""
    async with get_database().transaction() as session:
        schedule = await schedules.get(session, schedule_id, caller, lock=True)
        await schedules.replace(session, schedule, body, caller)
        return _view(schedule)


@router.delete("/{schedule_id}", status_code=204)
async def delete_schedule(schedule_id: ScheduleId, caller: CurrentCaller) -> None:
    """Delete a schedule. The jobs that it has queued stay."""
    async with get_database().transaction() as session:
        await session.delete(await schedules.get(session, schedule_id, caller, lock=True))


def _view(schedule: Schedule, short: ShortValues | None = None) -> ScheduleView:
    short = short or ShortValues({"spec": schedule.spec}, [])
    copied_fields = set(ScheduleView.model_fields) - {"spec", "truncated"}
    return ScheduleView(
        **{name: getattr(schedule, name) for name in copied_fields},
        spec=short.values["spec"] or {},
        truncated=short.truncated,
    )
