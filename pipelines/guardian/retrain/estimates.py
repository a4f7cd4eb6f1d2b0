"""How long the steps of a plan will take: as long as they have taken on this cluster, as soon as they have run here."""

from collections.abc import Sequence
from statistics import median
from typing import Literal

from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from jobs.states import State
from jobs.tables import Job

RECENT_JOBS = 25
"""Of how many jobs of a kind, the newest, the middle duration is taken."""

DEFAULT_MINUTES = {
    "extract_data": 5.0,
    "gather_feedback": 1.0,
    "validate_data": 2.0,
    "fine_tune": 25.0,
    "export": 5.0,
    "validate": 5.0,
    "compare": 4.0,
    "deploy": 1.0,
}
"""For a machine on which none of these has run yet."""


class Step(BaseModel):
    id: str = Field(description="Its place in the plan, from 1.")
    name: str
    estimated_minutes: float
    estimate: Literal["measured", "default"] = Field(
        description="measured: from how long this step has taken on this cluster. default: it has not run here yet."
    )


async def estimate_steps(session: AsyncSession, steps: Sequence[str]) -> list[Step]:
    """The steps, which are named by their kinds of job, with how long each will take."""
    estimated: list[Step] = []
    for number, name in enumerate(steps, 1):
        minutes = await _minutes(session, name)
        estimated_minutes = DEFAULT_MINUTES[name] if minutes is None else minutes
        estimate = "default" if minutes is None else "measured"
        estimated.append(
            Step(id=str(number), name=name, estimated_minutes=round(estimated_minutes, 2), estimate=estimate)
        )
    return estimated


async def _minutes(session: AsyncSession, kind: str) -> float | None:
    """None, when no job of this kind has succeeded yet."""
    done = select(Job.started_at, Job.finished_at).where(Job.kind == kind, Job.state == State.SUCCEEDED)
    newest = await session.execute(done.order_by(Job.finished_at.desc()).limit(RECENT_JOBS))
    seconds = [(row.finished_at - row.started_at).total_seconds() for row in newest.all() if row.started_at]
    return median(seconds) / 60 if seconds else None
