"""What a job's function is given: how it reports, saves its place, hears that it should stop, and has children.

    @job("count", spec=CountSpec)
    def count(context: Context, spec: CountSpec) -> dict[str, int]:
        for number in range(context.checkpoint_state or 0, spec.until):
            context.report(progress=100 * number / spec.until)
            context.checkpoint(number + 1)
        return {"counted": spec.until}

The function runs in a thread of its own; every method may be called from any thread. A context may be sent to other
processes that the job starts on Ray, and works there too (jobs/execution/remote_context.py).
"""

import contextvars
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from jobs.leases import Claim
from jobs.queue import ChildFailed
from jobs.registry import Resources
from jobs.states import State
from jobs.tables import Job

StopReason = Literal["cancel", "pause", "time_limit", "stall_limit", "lease_lost"]


class StopJob(BaseException):
    """Ends a job's function from inside, past any `except Exception` in its way."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(reason)
        self.reason: StopReason = reason


class ParkJob(BaseException):
    """Ends a job's function until its children have finished."""

    def __init__(self, children: list[str]) -> None:
        super().__init__(*children)
        self.children = children


class WorkerLink(Protocol):
    """The worker behind a context."""

    def report(self, claim: Claim, values: Mapping[str, Any], event: tuple[str, dict[str, Any]]) -> None: ...
    def checkpoint(self, claim: Claim, state: Any) -> None: ...
    def artifact(self, claim: Claim, path: Path, name: str) -> str: ...
    def child(
        self, claim: Claim, name: str, kind: str, spec: Mapping[str, Any], resources: Resources | None
    ) -> Job: ...


class Context:
    def __init__(self, claim: Claim, link: WorkerLink, restore: Callable[[Claim], "Context"] | None = None) -> None:
        self.job_id = claim.job_id
        self.owner_id = claim.owner_id
        self.attempt = claim.attempt
        self.checkpoint_state = claim.checkpoint
        """What the last `checkpoint` saved, by this attempt or one before; None at the very start."""
        self.last_activity = time.monotonic()
        self._claim = claim
        self._link = link
        self._restore = restore  # makes this context anew in another process
        self._stop = threading.Event()
        self._reason: StopReason | None = None

    def report(self, progress: float | None = None, phase: str | None = None, **metrics: float) -> None:
        """Tell how far the job is, in percent, what it does, and any numbers worth following. Cheap: call it often."""
        self._raise_if_stopped()
        values: dict[str, Any] = {}
        if progress is not None:
            values["progress"] = round(min(max(progress, 0.0), 100.0), 2)
        if phase is not None:
            values["phase"] = phase
        self._mark_active()
        self._link.report(self._claim, values, ("progress", {**values, **({"metrics": metrics} if metrics else {})}))

    def checkpoint(self, state: Any) -> None:
        """Save the place to go on from; returns when it is safe. Large state goes to storage, and its address here.

        This is where a job that was asked to pause pauses.
        """
        self._raise_if_stopped()
        self._link.checkpoint(self._claim, state)
        self.checkpoint_state = state
        self._mark_active()
        if self._reason is not None:
            raise StopJob(self._reason)

    def log(self, message: str, level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO") -> None:
        self._mark_active()
        self._link.report(self._claim, {}, ("log", {"level": level, "message": message}))

    def input(self, name: str, digest: str, source: str, **profile: int | float | str) -> None:
        """Tell what data the job works on. A tracked job's inputs go to MLflow."""
        self._mark_active()
        self._link.report(
            self._claim, {}, ("input", {"name": name, "digest": digest, "source": source, "profile": profile})
        )

    def artifact(self, path: Path, name: str | None = None) -> str:
        """Keep a file that the job has made; returns its address in storage. A tracked job's go to MLflow too."""
        self._mark_active()
        return self._link.artifact(self._claim, path, name or path.name)

    def should_stop(self) -> bool:
        """Whether somebody wants this job to stop: return to a place where it can checkpoint, and do."""
        return self._reason is not None

    def sleep(self, seconds: float) -> None:
        """Wait, but end with the job when it is stopped. (A pause waits for the next checkpoint.)"""
        self._stop.wait(seconds)
        self._raise_if_stopped()

    def child(self, name: str, kind: str, spec: Mapping[str, Any], resources: Resources | None = None) -> Job:
        """The child of this name: queued now if there is none yet, so that a job that runs again finds its own.

        Without `resources` it gets those of its kind.
        """
        self._raise_if_stopped()
        return self._link.child(self._claim, name, kind, spec, resources)

    def join(self, *children: Job) -> list[Any]:
        """The results of children that have all succeeded. Until they have, the job gives its room back and parks:
        its function ends here, and is called again from the last checkpoint when they are done."""
        for child in children:
            if child.state in {State.FAILED, State.CANCELLED}:
                raise ChildFailed(child)
        unfinished = [child.id for child in children if child.state != State.SUCCEEDED]
        if unfinished:
            raise ParkJob(unfinished)
        return [child.result for child in children]

    def stop(self, reason: StopReason | None) -> None:
        """The worker's side: ask the function to stop, or take a pause back."""
        self._reason = reason
        if reason not in {None, "pause"}:
            self._stop.set()

    @property
    def stop_reason(self) -> StopReason | None:
        return self._reason

    def __reduce__(self) -> tuple[Any, ...]:
        if self._restore is None:
            raise TypeError("this context was not made by a worker, so it cannot be sent to another process")
        return self._restore, (self._claim,)

    def _mark_active(self) -> None:
        self.last_activity = time.monotonic()

    def _raise_if_stopped(self) -> None:
        """A pause waits for the next checkpoint, so that nothing done since the last one is lost."""
        if self._reason is not None and self._reason != "pause":
            raise StopJob(self._reason)


current_context: contextvars.ContextVar[Context | None] = contextvars.ContextVar("current", default=None)


class JobLogHandler(logging.Handler):
    """Copies what a job's function and its libraries log through `logging` into the job's own log."""

    def emit(self, record: logging.LogRecord) -> None:
        context = current_context.get()
        if context is None:
            return
        try:
            message = self.format(record)
        except Exception:
            return self.handleError(record)  # a log line that is wrong is no reason for the job to fail
        else:
            level: Any = record.levelname if record.levelname in {"DEBUG", "WARNING", "ERROR"} else "INFO"
            context.log(message, level)
