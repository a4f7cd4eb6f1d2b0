"""The context of a running job: its function reports progress, saves checkpoints, reacts to stops, and starts children.

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

from cluster import logs
from jobs.leases import Claim
from jobs.queue import ChildFailed
from jobs.registry import Resources
from jobs.states import State
from jobs.tables import Job

StopReason = Literal["cancel", "pause", "time_limit", "stall_limit", "lease_lost", "lease_expired", "cleared"]


class StopJob(BaseException):
    """Ends a job's function from inside. It is not an Exception, so `except Exception` does not catch it."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(reason)
        self.reason: StopReason = reason


class ParkJob(BaseException):
    """Ends a job's function until its children have finished."""

    def __init__(self, children: list[str]) -> None:
        super().__init__(*children)
        self.children = children


class WorkerLink(Protocol):
    """What a context needs of its worker."""

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
        """The state of the last `checkpoint`, of this attempt or an earlier one. None: there is no checkpoint."""
        self.last_activity = time.monotonic()
        self._claim = claim
        self._link = link
        self._restore = restore  # creates this context in another process
        self._stop = threading.Event()
        self._reason: StopReason | None = None

    def report(self, progress: float | None = None, phase: str | None = None, **metrics: float) -> None:
        """Report the progress in percent, the phase and metrics. It is cheap, so call it often."""
        self._raise_if_stopped()
        values: dict[str, Any] = {}
        if progress is not None:
            values["progress"] = round(min(max(progress, 0.0), 100.0), 2)
        if phase is not None:
            values["phase"] = phase
        self._mark_active()
        self._link.report(self._claim, values, ("progress", {**values, **({"metrics": metrics} if metrics else {})}))

    def checkpoint(self, state: Any) -> None:
        """Save the state from which the next attempt continues. Returns when it is stored.

        Put large state into storage, and its address here. A requested pause takes effect here.
        """
        self._raise_if_stopped()
        self._link.checkpoint(self._claim, state)
        self.checkpoint_state = state
        self._mark_active()
        if self._reason is not None:
            raise StopJob(self._reason)

    def log(self, message: str, level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO") -> None:
        """Write a line to the log of the job. Secrets in it are masked, as in all logs."""
        self._mark_active()
        self._link.report(self._claim, {}, ("log", {"level": level, "message": logs.redact(message)}))

    def input(self, name: str, digest: str, source: str, **profile: int | float | str) -> None:
        """Record data that the job uses. The inputs of a tracked job are sent to MLflow."""
        self._mark_active()
        self._link.report(
            self._claim, {}, ("input", {"name": name, "digest": digest, "source": source, "profile": profile})
        )

    def artifact(self, path: Path, name: str | None = None) -> str:
        """Store a file, and return its address in storage. The artifacts of a tracked job are sent to MLflow too."""
        self._mark_active()
        return self._link.artifact(self._claim, path, name or path.name)

    def storage_name(self, name: str) -> str:
        """Return a name in storage that no other attempt uses, so that a worker that was given up spoils nothing.

        Put the address into the checkpoint or the result. What neither of them names is deleted with the next attempt.
        """
        return self._claim.storage_name(name)

    def should_stop(self) -> bool:
        """Whether a stop or a pause was requested. If so, the function should call `checkpoint` soon."""
        return self._reason is not None

    def sleep(self, seconds: float) -> None:
        """Wait. A stop ends the wait and the job; a pause waits for the next checkpoint."""
        self._stop.wait(seconds)
        self._raise_if_stopped()

    def child(self, name: str, kind: str, spec: Mapping[str, Any], resources: Resources | None = None) -> Job:
        """Return the child with this name. It is queued if there is none, so a job that runs again finds its children.

        Without `resources` it gets those of its kind.
        """
        self._raise_if_stopped()
        return self._link.child(self._claim, name, kind, spec, resources)

    def join(self, *children: Job) -> list[Any]:
        """Return the results of children, if all have succeeded. Else the job parks.

        A parked job frees its capacity: its function ends here. It is called again, from the last checkpoint, when
        these children have finished.
        """
        for child in children:
            if child.state in {State.FAILED, State.CANCELLED}:
                raise ChildFailed(child)
        unfinished = [child.id for child in children if child.state != State.SUCCEEDED]
        if unfinished:
            raise ParkJob(unfinished)
        return [child.result for child in children]

    def stop(self, reason: StopReason | None) -> None:
        """Called by the worker: request a stop or a pause, or withdraw a pause."""
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
        """Raise StopJob after a stop request. A pause waits for the next checkpoint, so that no work is lost."""
        if self._reason is not None and self._reason != "pause":
            raise StopJob(self._reason)


current_context: contextvars.ContextVar[Context | None] = contextvars.ContextVar("current", default=None)


class JobLogHandler(logging.Handler):
    """Copies what a job's function and its libraries log through `logging` to the log of the job."""

    def emit(self, record: logging.LogRecord) -> None:
        context = current_context.get()
        if context is None:
            return
        try:
            message = self.format(record)
        except Exception:
            return self.handleError(record)  # an invalid log call must not fail the job
        else:
            level: Any = record.levelname if record.levelname in {"DEBUG", "WARNING", "ERROR"} else "INFO"
            context.log(message, level)
