"""Read the log files of all components in one order of time: the last lines, and new ones as they are written."""

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
    """Return the last `count` matching lines of all components, oldest first."""
    newest_first = heapq.merge(
        *(_read_backwards(path) for path in _files(rotated=True)), key=lambda line: str(line["timestamp"]), reverse=True
    )
    return list(islice(filter(matches, newest_first), count))[::-1]


def follow(matches: Callable[[Line], bool]) -> Iterator[Line]:
    """Yield each matching line that is written from now on, without end."""
    return _follow({path: path.stat().st_size for path in _files()}, matches)


def _follow(positions: dict[Path, int], matches: Callable[[Line], bool]) -> Iterator[Line]:
    while True:
        new_lines = [line for path in _files() for line in _read_new_lines(path, positions)]
        yield from sorted(filter(matches, new_lines), key=lambda line: str(line["timestamp"]))
        time.sleep(POLL_SECONDS)


def line_filter(component: str | None, level: str | None) -> Callable[[Line], bool]:
    """Return a filter for lines of one component (None: all) and of at least this level (None: all)."""
    min_severity = LEVELS.index(level) if level else 0
    return lambda line: component in (None, line["component"]) and _severity(line) >= min_severity


def _severity(line: Line) -> int:
    return LEVELS.index(line["level"]) if line["level"] in LEVELS else 0


def _files(*, rotated: bool = False) -> list[Path]:
    return sorted(path for path in logs_setup.folder().glob("*.jsonl*") if rotated or path.suffix == ".jsonl")


def _read_backwards(path: Path) -> Iterator[Line]:
    """Yield a file's lines from its end. Only the blocks that are needed are read."""
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
            position = 0  # the file was rotated, and this is the new one
        file.seek(position)
        text = file.read()
    complete = text[: text.rfind(b"\n") + 1]
    positions[path] = position + len(complete)
    for line in complete.split(b"\n"):
        yield from _parse(line)


def _parse(text: bytes) -> Iterator[Line]:
    """Yield the parsed line. A line that was cut off, as by a power cut, is skipped."""
    try:
        line: Any = json.loads(text)
    except ValueError:
        return
    if isinstance(line, dict) and {"timestamp", "level", "component", "message"} <= line.keys():
        yield line
