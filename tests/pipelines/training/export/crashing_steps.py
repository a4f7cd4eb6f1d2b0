"""Steps that fail in different ways, and one that prints too much."""

import os
import sys
from typing import Any

from cluster.errors import NotFound
from jobs.execution.isolated import OnProgress


def abort(report: OnProgress) -> None:
    print("Last words", file=sys.stderr, flush=True)
    os.abort()


def fail(report: OnProgress) -> None:
    raise KeyError("nowhere")


def refuse(report: OnProgress) -> None:
    raise NotFound("as it was raised")


def chatter(report: OnProgress) -> dict[str, Any]:
    """Print text that is no result to the pipe of the results, and more than the pipe holds."""
    report(0.5, "chattering")
    print("this is no answer", flush=True)
    os.write(1, b"x" * 200_000 + b"\n")
    return {"heard": True}


def environment(report: OnProgress) -> dict[str, str]:
    return dict(os.environ)
