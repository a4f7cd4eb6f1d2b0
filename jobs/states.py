"""The states of a job and the moves between them.

             ┌───────────── e ─────────────┐
             ▼                             │
(enqueue) queued ───── a ─────▶ running ───┤
             │ ▲                   │  │    ├─ b ─▶ succeeded
             │ │                   f  │    ├─ c ─▶ failed ─────┐
             │ └─── g ─── paused ◀─┘  │    └─ d ─▶ cancelled ──┤
             └── f, d ──────▲─────────┘                        │
             ▲                                                 │
             └───────────────────── h ─────────────────────────┘

a  the dispatcher claims it and gives it a lease
b  its function returned
c  its function raised an error that is not worth another attempt, or a job it depends on did not succeed
d  somebody cancelled it, or its parent
e  its worker was lost, it met an error worth another attempt, or it parks until its children have finished
f  somebody paused it, or its parent: at once when queued, at the next checkpoint when running
g  somebody resumed it, or its parent
h  somebody retried it: it starts with a fresh count of attempts, from its last checkpoint
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
    """What somebody has asked of a running job."""

    PAUSE = "pause"
    CANCEL = "cancel"


FINISHED = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})
RETRYABLE = frozenset({State.FAILED, State.CANCELLED})
