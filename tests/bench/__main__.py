"""`make bench`: every figure next to its peer's in the same run, as a table and as a file in tests/bench/results/.

`python -m tests.bench start jobs` measures only those parts.
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench import extraction, forge, gateway, growth, hostile, idle, jobs, overhead, serving, startup
from tests.bench.figures import Figure, machine
from tests.bench.postgres import new_database, running_postgres
from tests.support.platform import Platform, running_platform

RESULTS = Path(__file__).parent / "results"
SETTLE_SECONDS = 15
IDLE_SECONDS = 60

console = Console(width=140, highlight=False)


def measure_start() -> Iterator[list[Figure]]:
    yield startup.command_line()
    with _platform() as platform:
        yield startup.up(platform)
        time.sleep(SETTLE_SECONDS)  # what a start leaves behind is not rest
        yield idle.figures(platform, IDLE_SECONDS)


def measure_gateway() -> Iterator[list[Figure]]:
    with _platform() as platform:
        yield gateway.ping(platform, replicas=1)
        yield gateway.layers(platform)
        yield [gateway.post_jobs(platform)]
    with _platform({"serve.replicas": "2"}) as platform:
        yield gateway.ping(platform, replicas=2)


def measure_hostile() -> Iterator[list[Figure]]:
    settings = {"auth.required": "true", "limits.enabled": "false", "limits.account_jobs": "null"}
    with running_platform(settings, with_admin=True) as platform:
        yield hostile.figures(platform)


def measure_jobs() -> Iterator[list[Figure]]:
    with _platform() as platform:
        yield jobs.on_sqlite(platform)


def measure_past() -> Iterator[list[Figure]]:
    with _platform() as empty, _platform() as full:
        jobs.give_a_past(full)
        yield jobs.with_a_past(empty, full)


def measure_postgres() -> Iterator[list[Figure]]:
    with running_postgres() as server, _platform({"database.url": new_database(server)}) as platform:
        yield jobs.on_postgres(platform, lambda: new_database(server))


def measure_training() -> Iterator[list[Figure]]:
    with running_platform() as platform:
        yield forge.imports(platform)
        yield forge.short(platform, workers=1)
        yield forge.short(platform, workers=2)
        yield forge.step(platform)


def measure_serving() -> Iterator[list[Figure]]:
    with running_platform({"engines.slots": str(serving.SLOTS), "engines.context": str(serving.CONTEXT)}) as platform:
        figures, reference, file = forge.export(platform)
        yield figures
        yield serving.figures(platform, reference, file)


def measure_overhead() -> Iterator[list[Figure]]:
    with running_platform({"engines.slots": str(overhead.CONNECTIONS)}) as platform:
        yield overhead.figures(platform)


def measure_extraction() -> Iterator[list[Figure]]:
    yield extraction.figures()


def measure_growth() -> Iterator[list[Figure]]:
    with tempfile.TemporaryDirectory(prefix="forgearr-growth-") as folder:
        yield growth.figures(Path(folder))


PARTS: dict[str, Callable[[], Iterator[list[Figure]]]] = {
    "start": measure_start,
    "gateway": measure_gateway,
    "hostile": measure_hostile,
    "jobs": measure_jobs,
    "past": measure_past,
    "postgres": measure_postgres,
    "training": measure_training,
    "serving": measure_serving,
    "overhead": measure_overhead,
    "extraction": measure_extraction,
    "growth": measure_growth,
}


def main(parts: list[str]) -> None:
    began, surroundings = time.monotonic(), machine()
    figures: list[Figure] = []
    for part in parts or PARTS:
        for found in PARTS[part]():
            figures += found
            console.print(_table(found))
    taken = time.monotonic() - began
    console.print(f"{len(figures)} figures in {taken / 60:.1f} minutes: {_write(figures, surroundings, taken)}")


@contextmanager
def _platform(settings: dict[str, str] | None = None) -> Generator[Platform]:
    kinds = {"jobs.modules": "[jobs.probe, jobs.sweep, tests.bench.kinds]"}
    with running_platform({**kinds, **(settings or {})}) as platform:
        yield platform


def _table(figures: list[Figure]) -> Table:
    table = Table(figures[0].group, "ours", "unit", "peer", "peer's", "ratio", box=None, header_style="bold")
    for figure in figures:
        peer = "" if figure.peer is None else _shown(figure.peer)
        ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
        table.add_row(figure.name, _shown(figure.ours), figure.unit, figure.peer_name, peer, ratio)
    return table


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _write(figures: list[Figure], surroundings: dict[str, Any], seconds: float) -> Path:
    moment = datetime.now(UTC)
    document = {
        "date": f"{moment:%Y-%m-%dT%H:%M:%SZ}",
        "seconds": round(seconds),
        "machine": surroundings,
        "figures": [dataclasses.asdict(figure) for figure in figures],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{moment:%Y-%m-%d-%H%M%S}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path.relative_to(Path.cwd())


if __name__ == "__main__":
    main(sys.argv[1:])
