"""How long the command line and a whole start take."""

import re
import subprocess
import sys
import time
from statistics import median

from tests.bench.figures import Figure, compare
from tests.support.platform import BINARIES, Platform

GROUP = "Start"
RUNS = 10
# What a help text costs with the same libraries when nothing else is imported.
SMALL_APPLICATION = "import typer; app = typer.Typer(); app.command()(lambda: None); app(['--help'])"


def command_line() -> list[Figure]:
    python = [sys.executable, "-c"]

    def forgearr() -> float:
        return _seconds([str(BINARIES / "forgearr"), "--help"])

    def small() -> float:
        return _seconds([*python, SMALL_APPLICATION])

    def imported() -> float:
        return _seconds([*python, "import cluster.cli"])

    def bare() -> float:
        return _seconds([*python, "import typer"])

    return [
        compare(GROUP, "forgearr --help", "s", forgearr, "smallest typer application", small, RUNS),
        compare(GROUP, "import cluster.cli", "s", imported, "import typer", bare, RUNS),
    ]


def up(platform: Platform, runs: int = 2) -> list[Figure]:
    """`up --detach` of a platform that has run before, until it is healthy, and when each of its steps was done."""
    seconds: list[float] = []
    steps: dict[str, list[float]] = {}
    for _ in range(runs):
        platform.down()
        started = time.monotonic()
        shown = platform.cli("up", "--detach").stdout
        seconds.append(time.monotonic() - started)
        for moment, step in re.findall(r"^ *([\d.]+) s +(\w+)", shown, re.MULTILINE):
            steps.setdefault(step, []).append(float(moment))
    figures = [Figure(GROUP, "up --detach until healthy", "s", median(seconds), rounds=list(seconds))]
    for step, moments in steps.items():
        figures.append(Figure(GROUP, f"  … {step} after", "s", median(moments), rounds=list(moments)))
    return figures


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60)
    return time.perf_counter() - started
