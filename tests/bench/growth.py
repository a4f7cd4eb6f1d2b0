"""How large an installation becomes: `python -m tests.bench.growth DAYS`, in a FORGEARR_HOME of its own.

Each simulated day adds the rows that a day leaves (finished jobs with their events, ticks of schedules, folders of
failed trainings, batches, logins), with the times of that day, and then runs the real sweep with its clock at the end
of the day. Prints JSON: a line for day 30 and for the last day.
"""

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from sqlalchemy import insert

from cluster import db, identity, storage
from cluster.db import Database, get_database
from cluster.migrations import migrate
from cluster.secrets import token_hash
from cluster.settings import home
from jobs import schedules
from jobs.context import Context
from jobs.leases import Claim
from jobs.registry import kinds
from jobs.states import State
from jobs.sweep import SWEEP_SCHEDULE, SweepSpec, sweep
from jobs.tables import Job, JobEvent, Schedule, ScheduleTick
from pipelines.training.sessions import TrainingSession
from serve.openai.batches.store import Batch
from tests.bench.figures import Figure
from tests.support.recording_link import RecordingLink

GROUP = "Growth on SQLite"
MONTH, YEAR = 30, 365
SPEC, RESULT = {"payload": "x" * 300}, {"payload": "x" * 300, "executed": list(range(20))}
ROUTINE = {"watch_downloads": 1440, "check_services": 288, "watch_repositories": 288, "sweep": 24}
"""How many jobs the schedules of a home make each day, with the default settings."""
USER_JOBS = 695
FAMILIES = 1  # forge, with fine_tune, export and validate; every second one fails
BATCHES = 1
LOGINS = 10
JOBS_A_DAY = sum(ROUTINE.values()) + USER_JOBS + 4 * FAMILIES + BATCHES
WEIGHTS = b"x" * 100_000
"""What a failed training leaves, much smaller than real ones."""


def figures(folder: Path) -> list[Figure]:
    command = [sys.executable, "-m", "tests.bench.growth", str(YEAR)]
    environment = os.environ | {"FORGEARR_HOME": str(folder), "FORGEARR_MLFLOW__ENABLED": "false"}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    month, year = (json.loads(line) for line in output.splitlines())
    jobs = f"{JOBS_A_DAY * YEAR:,} jobs"
    return [
        Figure(
            GROUP,
            f"{name}, after a year ({jobs})",
            unit,
            year[key] / scale,
            "after a month",
            month[key] / scale,
            year[key] / month[key],
        )
        for name, key, unit, scale in (
            ("Database file", "database_bytes", "MB", 1e6),
            ("  … without its free pages", "used_bytes", "MB", 1e6),
            ("Folders of failed trainings", "folder_bytes", "MB", 1e6),
            ("Rows of jobs", "jobs", "rows", 1),
            ("Sweep of a day, longest of the last 10", "sweep_seconds", "s", 1),
        )
    ]


class Clock:
    """Stands for `cluster.db.now` in all modules that use it."""

    def __init__(self, moment: datetime) -> None:
        self.moment = moment

    def __call__(self) -> datetime:
        return self.moment

    def install(self) -> None:
        for module in list(sys.modules.values()):
            if getattr(module, "now", None) is db.now and module is not db:
                module.now = self  # pyright: ignore[reportAttributeAccessIssue]
        db.now = self


async def main(days: int) -> None:
    await migrate()
    kinds()  # imports all modules with sweepers
    database = get_database()
    clock = Clock(db.now() - timedelta(days=days))
    clock.install()
    user = await _start(database)
    sweeps: list[float] = []
    for day in range(1, days + 1):
        start, clock.moment = clock.moment, clock.moment + timedelta(days=1)
        await _add_day(database, start, user, day)
        claim = Claim("job_sweep", "t", "sweep", {}, None, 1, 3, None, None, {}, "worker-1", None)
        began = time.perf_counter()
        await asyncio.to_thread(sweep, Context(claim, RecordingLink()), SweepSpec())
        sweeps.append(time.perf_counter() - began)
        if day in {MONTH, days}:
            print(json.dumps(await asyncio.to_thread(_sizes) | {"sweep_seconds": max(sweeps[-10:])}), flush=True)
    await database.close()


async def _start(database: Database) -> str:
    """Add an account and the schedules of a home. Returns the id of the account."""
    async with database.transaction() as session:
        user = await identity.add_user(session, email="ada@example.org", username="ada", password_hash="-")
        for kind in ROUTINE:
            request = SWEEP_SCHEDULE.model_copy(update={"name": kind, "kind": kind})
            await schedules.ensure(session, request)
    return user.id


async def _add_day(database: Database, start: datetime, user: str, day: int) -> None:
    rows = Rows(start)
    async with database.read_transaction() as session:
        ids = {row.kind: row.id for row in await session.execute(Schedule.__table__.select())}
    for kind, number in ROUTINE.items():
        for moment in _spread(start, number):
            job_id = rows.job(kind, moment, spec={}, result={"polled": 3}, created_by=f"schedule:{kind}")
            rows.ticks.append({"schedule_id": ids[kind], "fire_at": moment, "job_id": job_id})
    for moment in _spread(start, USER_JOBS):
        rows.job("probe", moment, owner_id=user)
    for number, moment in enumerate(_spread(start, FAMILIES)):
        await _add_family(rows, moment, user, has_failed=(day + number) % 2 == 0)
    for moment in _spread(start, BATCHES):
        rows.add_batch(moment, user)
    tokens = [
        {"hash": token_hash(uuid4().hex), "family": uuid4().hex, "user_id": user, "expires_at": start + timedelta(30)}
        for _ in range(LOGINS)
    ]
    async with database.transaction() as session:
        for table, values in (
            (Job, rows.jobs),
            (JobEvent, rows.events),
            (ScheduleTick, rows.ticks),
            (TrainingSession, rows.sessions),
            (Batch, rows.batches),
            (identity.RefreshToken, tokens),
        ):
            if values:
                await session.execute(insert(table), values)


async def _add_family(rows: "Rows", moment: datetime, user: str, *, has_failed: bool) -> None:
    state = State.FAILED if has_failed else State.SUCCEEDED
    parent = rows.job("forge", moment, state=state, owner_id=user)
    training = rows.job("fine_tune", moment, state=state, owner_id=user, parent_id=parent)
    if has_failed:
        await asyncio.to_thread(_leave_checkpoint, training)
        return
    for kind in ("export", "validate"):
        rows.job(kind, moment, owner_id=user, parent_id=parent)
    if moment.day % 7 == 0:
        times = {"created_at": moment, "updated_at": moment}
        columns = {"name": "House", "base_model": "forgearr/tiny", "config": {}, "created_by": "ada"}
        rows.sessions.append({"id": uuid4().hex, "job_id": training, "owner_id": user, **columns, **times})


def _leave_checkpoint(job_id: str) -> None:
    file = storage.StorageWriter(f"jobs/{job_id}/checkpoints/1-20/model.safetensors")
    file.write(WEIGHTS)
    file.commit()


class Rows:
    """The rows of one day, by table."""

    def __init__(self, start: datetime) -> None:
        self.jobs: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.ticks: list[dict[str, Any]] = []
        self.sessions: list[dict[str, Any]] = []
        self.batches: list[dict[str, Any]] = []
        self._prefix = f"job_{start:%Y%m%d}"

    def job(self, kind: str, moment: datetime, state: State = State.SUCCEEDED, **columns: Any) -> str:
        """Add a finished job and its events. Returns its id."""
        job_id = f"{self._prefix}_{len(self.jobs):06}"
        is_routine = kind in ROUTINE
        optional = {"owner_id": None, "parent_id": None, "created_by": "ada", "spec": SPEC, "result": RESULT}
        times = dict.fromkeys(("run_after", "created_at", "started_at", "finished_at", "updated_at"), moment)
        fixed = {"resources": {"cpus": 0}, "demand": "", "max_attempts": 3, "attempt": 1, "progress": 100.0}
        self.jobs.append({"id": job_id, "kind": kind, "state": state, **optional, **times, **fixed, **columns})
        steps = [("progress", {"phase": f"step {step} of 20", "metrics": {"step": step}}) for step in range(5)]
        entries: list[tuple[str, dict[str, Any]]] = [
            ("queued", {"kind": kind}),
            ("running", {"attempt": 1, "worker": "worker-481935"}),
            *([] if is_routine else [*steps, ("checkpoint", {"checkpoint": True, "bytes": 40})]),
            (str(state), {}),
        ]
        self.events += [
            {"job_id": job_id, "type": event, "data": data, "created_at": moment} for event, data in entries
        ]
        return job_id

    def add_batch(self, moment: datetime, user: str) -> None:
        job_id = self.job("batch", moment, owner_id=user, result={"status": "completed"})
        columns = {"endpoint": "/v1/embeddings", "input_file_id": "file-1", "labels": {}, "created_by": "ada"}
        times = {"created_at": moment, "expires_at": moment + timedelta(days=1)}
        self.batches.append({"id": f"batch_{uuid4().hex}", "job_id": job_id, "owner_id": user, **columns, **times})


def _spread(start: datetime, number: int) -> Iterator[datetime]:
    return (start + timedelta(days=1) / number * index for index in range(number))


def _sizes() -> dict[str, int]:
    path = home() / "forgearr.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        page_size, free, jobs = (
            connection.execute(query).fetchone()[0]
            for query in ("PRAGMA page_size", "PRAGMA freelist_count", "SELECT count(*) FROM jobs")
        )
    size = path.stat().st_size
    left = [file.stat().st_size for file in Path(storage.address("jobs")).rglob("*.safetensors")]
    return {
        "database_bytes": size,
        "used_bytes": size - free * page_size,
        "folder_bytes": sum(left),
        "jobs": jobs,
    }


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
