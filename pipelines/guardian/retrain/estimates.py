"""Estimate the duration of a plan's steps from earlier jobs of this cluster, or from defaults."""

from collections.abc import Sequence
from statistics import median
from typing import Literal

from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from jobs.states import State
from jobs.tables import Job

RECENT_JOBS = 25
"""The median duration of this many of the newest jobs of a kind is used."""

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
"""For a cluster that has not run the kind yet."""


class Step(BaseModel):
    id: str = Field(description="Its number in the plan, from 1.")
    name: str
    estimated_minutes: float
    estimate: Literal["measured", "default"] = Field(
        description="measured: from earlier jobs of this cluster. default: the step has not run here yet."
    )


async def estimate_steps(session: AsyncSession, steps: Sequence[str]) -> list[Step]:
    """The steps, named by their kinds of job, with the estimated duration of each."""
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
    """The median duration of a kind; None if no job of it has succeeded yet."""
    done = select(Job.started_at, Job.finished_at).where(Job.kind == kind, Job.state == State.SUCCEEDED)
    newest = await session.execute(done.order_by(Job.finished_at.desc()).limit(RECENT_JOBS))
    seconds = [(row.finished_at - row.started_at).total_seconds() for row in newest.all() if row.started_at]
    return median(seconds) / 60 if seconds else None
