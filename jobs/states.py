"""The states of a job and the transitions between them.

             ┌───────────── e ─────────────┐
             ▼                             │
(enqueue) queued ───── a ─────▶ running ───┤
             │ ▲                   │  │    ├─ b ─▶ succeeded
             │ │                   f  │    ├─ c ─▶ failed ─────┐
             │ └─── g ─── paused ◀─┘  │    └─ d ─▶ cancelled ──┤
             └── f, d ──────▲─────────┘                        │
             ▲                                                 │
             └───────────────────── h ─────────────────────────┘

a  the dispatcher claims it and grants a lease
b  its function returned
c  its function raised an error that is not worth another attempt, or a job that it depends on did not succeed
d  it or its parent was cancelled
e  its worker was lost, it raised an error that is worth another attempt, or it parks until its children have finished
f  it or its parent was paused: at once when queued, at the next checkpoint when running
g  it or its parent was resumed
h  it was retried: it starts with a new count of attempts, from its last checkpoint
"""

from enum import StrEnum


class State(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Control(StrEnum):
    """A request to a running job."""

    PAUSE = "pause"
    CANCEL = "cancel"


FINISHED = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})
RETRYABLE = frozenset({State.FAILED, State.CANCELLED})
