"""The saved state and the lock of a running `forgearr up`, by which other processes find it or clean up after it."""

import fcntl
from collections.abc import Generator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import psutil
from pydantic import BaseModel, ValidationError

from cluster.errors import Conflict
from cluster.runtime import processes
from cluster.settings import get_settings, home


class AlreadyRunning(Conflict):
    """Forgearr is already running."""

    code = "ALREADY_RUNNING"


class RunState(BaseModel):
    """One run of the supervisor."""

    pid: int
    create_time: float
    """Start time of that process. It shows whether the pid was reused by another process."""
    version: str
    url: str
    started_at: datetime
    ready: bool = False
    """Whether the gateway has answered."""
    ports: list[int]
    ray_address: str
    dashboard_url: str | None
    """Ray's dashboard. None: that of a cluster that others started."""
    mlflow_uri: str | None
    """Without its password."""
    has_own_mlflow: bool

    @property
    def supervisor(self) -> psutil.Process | None:
        return processes.find_process(self.pid, self.create_time)


def folder() -> Path:
    path = home() / "run"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def last_run() -> RunState | None:
    """Return the run that was saved last. If it has ended, its `supervisor` is None."""
    try:
        return RunState.model_validate_json(_state_path().read_text())
    except FileNotFoundError:
        return None
    except ValidationError:
        return None  # written by another version of Forgearr; its processes are found by their mark


def current_run() -> RunState | None:
    """Return the last run if its supervisor is running."""
    run = last_run()
    return run if run and run.supervisor else None


def current_url() -> str:
    """Return the gateway's URL for clients on this machine. The running one may have other settings than ours."""
    run = current_run()
    return run.url if run else get_settings().url


def save_run(run: RunState) -> None:
    draft = _state_path().with_suffix(".draft")
    draft.write_text(run.model_dump_json(indent=2))
    draft.replace(_state_path())


def clear_run() -> None:
    _state_path().unlink(missing_ok=True)


@contextmanager
def exclusive_lock() -> Generator[None]:
    """Hold this installation's lock. The kernel releases it when this process ends, also by a crash."""
    with (folder() / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning(_already_running_message()) from None
        yield


def require_not_running() -> None:
    """Raise AlreadyRunning if this installation runs."""
    if current_run():
        raise AlreadyRunning(_already_running_message())


def _already_running_message() -> str:
    run = current_run()
    if run is None:
        return "Forgearr is just being started or stopped by another process; try again in a moment."
    return f"Forgearr is already running at {run.url} (process {run.pid}); `forgearr down` stops it."


def _state_path() -> Path:
    return folder() / "state.json"
