"""Stop the work of disabled accounts: cancel their jobs, and disable their schedules.

`cluster` disables accounts and knows no jobs, so the dispatcher looks for what is left to stop.
"""

from sqlalchemy import or_, select, update

from cluster.db import Database
from cluster.identity import User
from jobs import queue
from jobs.states import FINISHED, Control, State
from jobs.tables import Job, Schedule

PAGE = 500


async def stop_work(database: Database) -> None:
    disabled = select(User.id).where(~User.is_active)
    async with database.transaction() as session:
        disabled_schedules = update(Schedule).where(Schedule.enabled, Schedule.owner_id.in_(disabled))
        values = {"enabled": False, "next_fire_at": None}
        await session.execute(disabled_schedules.values(values).execution_options(synchronize_session=False))
    is_cancellable = or_(Job.state != State.RUNNING, Job.control.is_distinct_from(Control.CANCEL))
    unfinished = select(Job).where(Job.owner_id.in_(disabled), Job.state.not_in(FINISHED), is_cancellable)
    error = {"code": "account_disabled", "message": "The account in whose name it ran was disabled."}
    while True:
        async with database.transaction() as session:
            page = await queue.lock_jobs(session, unfinished.limit(PAGE))
            if not page:
                return
            await queue.cancel_all(session, page, error)
