"""The schedule `auto-audit`, which runs audits periodically: read and change it."""

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.errors import Conflict
from cluster.ownership import LOCAL, system
from jobs import schedules
from jobs.schedules import ScheduleRequest
from jobs.tables import Schedule
from pipelines.media.audit.audit_services import KIND

NAME = "auto-audit"
CRON_BY_HOURS = {
    1: "7 * * * *",
    2: "7 */2 * * *",
    3: "7 */3 * * *",
    4: "7 */4 * * *",
    6: "7 */6 * * *",
    8: "7 */8 * * *",
    12: "7 */12 * * *",
    24: "7 4 * * *",
    168: "7 4 * * 1",
}
"""The intervals for which a cron expression fires evenly."""
DEFAULT_HOURS = 24


class NameTaken(Conflict):
    """There is a schedule named `auto-audit` of another kind: rename it first."""

    code = "SCHEDULE_NAME_TAKEN"


async def state(session: AsyncSession) -> tuple[bool, int | None]:
    """Whether audits are scheduled, and their interval in hours; None if the cron expression is another one."""
    schedule = await _find(session)
    if schedule is None:
        return False, DEFAULT_HOURS
    return schedule.enabled, next((hours for hours, cron in CRON_BY_HOURS.items() if cron == schedule.cron), None)


async def change(session: AsyncSession, enabled: bool | None, hours: int | None) -> tuple[bool, int]:
    """Change the schedule. None leaves a value unchanged. Returns the new values."""
    schedule = await _find(session, lock=True)
    was_enabled, was_hours = await state(session)
    hours = hours or was_hours or DEFAULT_HOURS
    request = ScheduleRequest(
        name=NAME, kind=KIND, cron=CRON_BY_HOURS[hours], enabled=was_enabled if enabled is None else enabled
    )
    if schedule is None:
        await schedules.create(session, request, system("system"))
    else:
        request = request.model_copy(update={"spec": schedule.spec, "priority": schedule.priority})
        await schedules.replace(session, schedule, request, LOCAL)
    return request.enabled, hours


async def _find(session: AsyncSession, *, lock: bool = False) -> Schedule | None:
    query = select(Schedule).where(Schedule.name == NAME)
    schedule = await session.scalar(query.with_for_update() if lock else query)
    if schedule is not None and schedule.kind != KIND:
        raise NameTaken
    return schedule
