"""The claim: a job that was given to a worker."""

from dataclasses import dataclass
from typing import Any

OWN_WORKER = "a worker of its own"
"""The demand of a light job that may have killed the workers that it shared with other jobs."""


@dataclass(frozen=True)
class Claim:
    """A job that was given to a worker, with everything that the worker needs."""

    job_id: str
    token: str
    kind: str
    spec: dict[str, Any]
    checkpoint: Any
    attempt: int
    max_attempts: int
    time_limit: float | None
    stall_limit: float | None
    resources: dict[str, Any]
    worker: str
    owner_id: str | None  # None: the platform, or this machine's user
    is_suspect: bool = False  # a light job that has a worker of its own
    is_resumed: bool = False  # whether the job was given to a worker before

    def storage_name(self, name: str) -> str:
        """Return the name in storage of a file that this lease writes. No other lease of the job writes to it."""
        return f"jobs/{self.job_id}/{self.token}/{name}"
