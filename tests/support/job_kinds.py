"""Kinds of job for tests: they fail or behave in ways that the built-in ones do not. Loaded by `jobs.modules`."""

import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cluster.settings import get_settings
from jobs.context import Context, StopJob
from jobs.registry import Resources, job


class Empty(BaseModel):
    pass


class Seconds(BaseModel):
    seconds: float = 60


class Note(BaseModel):
    file: str


class Family(BaseModel):
    children: int = 3
    fail: bool = False


@job("deaf", spec=Seconds, max_attempts=1)
def deaf(context: Context, spec: Seconds) -> str:
    """Ignores every request to stop."""
    deadline = time.monotonic() + spec.seconds
    while time.monotonic() < deadline:
        time.sleep(0.05)
    return "finished all the same"


@job("hurried", spec=Seconds, max_attempts=1, time_limit=1)
def hurried(context: Context, spec: Seconds) -> None:
    """Exceeds its time limit."""
    while True:
        context.sleep(0.1)
        context.report(phase="still at it")


@job("silent", spec=Seconds, max_attempts=1, stall_limit=1)
def silent(context: Context, spec: Seconds) -> None:
    """Exceeds its stall limit."""
    context.sleep(spec.seconds)


@job("noted", spec=Note)
def noted(context: Context, spec: Note) -> None:
    """Writes into a file that it runs, and then why it was stopped."""
    note = Path(spec.file)
    _write(note, "running")
    try:
        context.sleep(86_400)
    except StopJob as stop:
        _write(note, stop.reason)
        raise


@job("family", spec=Family)
def family(context: Context, spec: Family) -> list[Any]:
    """Has children, and collects what they return."""
    children = [
        context.child(f"child {number}", "probe", {"payload": number, "steps": 2, "seconds": 0.2})
        for number in range(spec.children)
    ]
    if spec.fail:
        children.append(context.child("black sheep", "broken", {}))
    context.report(phase="collecting")
    return [result["payload"] for result in context.join(*children)]


@job("broken", spec=Empty)
def broken(context: Context, spec: Empty) -> None:
    """Has a bug."""
    raise KeyError("nowhere")


@job("deadly", spec=Empty)
def deadly(context: Context, spec: Empty) -> None:
    """Kills its worker."""
    os._exit(1)


@job("unstorable", spec=Empty)
def unstorable(context: Context, spec: Empty) -> object:
    """Returns something that is not JSON."""
    return object()


@job("odd", spec=Empty)
def odd(context: Context, spec: Empty) -> dict[str, Any]:
    """Reports and returns values that databases refuse."""
    context.report(phase="nul \0 here", loss=float("nan"))
    return {"nul": "a\0b", "nan": float("nan"), "infinity": float("inf")}


@job("talkative", spec=Empty)
def talkative(context: Context, spec: Empty) -> None:
    """Logs through the context and through `logging`."""
    context.log("through the context")
    logging.getLogger("some.library").warning("through %s", "logging")


@job("leaky", spec=Empty, max_attempts=1, tracked=True)
def leaky(context: Context, spec: Empty) -> None:
    """Logs the secrets of the settings, and fails with them, in the forms in which programs have them in errors."""
    settings = get_settings()
    url, redis = settings.database.url, settings.limits.storage.get_secret_value()
    text = f"GET {url and url.get_secret_value()} failed; {redis}; HF_TOKEN={os.environ.get('HF_TOKEN')}; "
    for key in (settings.auth.signing_key, settings.auth.sealing_key):
        text += f"Authorization: Bearer {key and key.get_secret_value()}; "
    context.log(text)
    logging.getLogger("some.library").warning("called %s", text)
    context.report(phase="failing")
    raise RuntimeError(text)


@job("measured", spec=Seconds, tracked=True)
def measured(context: Context, spec: Seconds) -> dict[str, str]:
    """Is a run in MLflow, with its data, metrics and an artifact."""
    context.input("homelab", "f" * 64, "storage/homelab.jsonl", samples=41)
    for step in range(5):
        context.report(progress=20 * (step + 1), step=step, loss=1 / (step + 1))
        context.sleep(spec.seconds / 5)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.md"
        report.write_text("# Measured\n")
        context.artifact(report)
    return {"verdict": "fine"}


@job("heavy", spec=Seconds, resources=Resources(cpus=1, memory_mb=64))
def heavy(context: Context, spec: Seconds) -> int:
    """Has a process of its own."""
    context.sleep(spec.seconds)
    return os.getpid()


def _write(note: Path, text: str) -> None:
    """At once: a reader sees the text before or this one, and never an empty file."""
    part = note.with_suffix(".part")
    part.write_text(text)
    part.replace(note)
