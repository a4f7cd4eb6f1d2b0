"""Reads what the components logged: the last lines of all files as one story, and those that come."""

import heapq
import json
import os
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from cluster.logs import setup as logs_setup

BLOCK_BYTES = 65536
POLL_SECONDS = 0.25
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

Line = dict[str, Any]


def recent(count: int, matches: Callable[[Line], bool]) -> list[Line]:
    """The last `count` wanted lines of all components, oldest first."""
    newest_first = heapq.merge(
        *(_read_backwards(path) for path in _files(rotated=True)), key=lambda line: str(line["timestamp"]), reverse=True
    )
    return list(islice(filter(matches, newest_first), count))[::-1]


def follow(matches: Callable[[Line], bool]) -> Iterator[Line]:
    """Each wanted line that is written from now on, until the caller has had enough."""
    return _follow({path: path.stat().st_size for path in _files()}, matches)


def _follow(positions: dict[Path, int], matches: Callable[[Line], bool]) -> Iterator[Line]:
    while True:
        new_lines = [line for path in _files() for line in _read_new_lines(path, positions)]
        yield from sorted(filter(matches, new_lines), key=lambda line: str(line["timestamp"]))
        time.sleep(POLL_SECONDS)


def line_filter(component: str | None, level: str | None) -> Callable[[Line], bool]:
    """A test for lines of one component (or any) that are at least as severe as `level` (or any)."""
    min_severity = LEVELS.index(level) if level else 0
    return lambda line: component in (None, line["component"]) and _severity(line) >= min_severity


def _severity(line: Line) -> int:
    return LEVELS.index(line["level"]) if line["level"] in LEVELS else 0


def _files(*, rotated: bool = False) -> list[Path]:
    return sorted(path for path in logs_setup.folder().glob("*.jsonl*") if rotated or path.suffix == ".jsonl")


def _read_backwards(path: Path) -> Iterator[Line]:
    """A file's lines from its end, reading no more of it than is asked for."""
    with path.open("rb") as file:
        position = file.seek(0, os.SEEK_END)
        remainder = b""
        while position > 0:
            start = max(0, position - BLOCK_BYTES)
            file.seek(start)
            first, *lines = (file.read(position - start) + remainder).split(b"\n")
            for text in reversed(lines):
                yield from _parse(text)
            remainder, position = first, start
        yield from _parse(remainder)


def _read_new_lines(path: Path, positions: dict[Path, int]) -> Iterator[Line]:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        position = positions.get(path, 0)
        if size < position:
            position = 0  # the file was set aside, and this is its successor
        file.seek(position)
        text = file.read()
    complete = text[: text.rfind(b"\n") + 1]
    positions[path] = position + len(complete)
    for line in complete.split(b"\n"):
        yield from _parse(line)


def _parse(text: bytes) -> Iterator[Line]:
    """A power cut leaves half a line now and then: that one is left out."""
    try:
        line: Any = json.loads(text)
    except ValueError:
        return
    if isinstance(line, dict) and {"timestamp", "level", "component", "message"} <= line.keys():
        yield line
