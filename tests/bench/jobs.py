"""The queue's figures: throughput and latency, next to DBOS, to procrastinate and to itself with a long past."""

import json
import sys
from collections.abc import Callable
from typing import Any

from tests.bench.figures import Figure, compare, figure_of_pairs, percentile
from tests.support.platform import Platform

SQLITE, POSTGRES, HISTORY = "Jobs on SQLite", "Jobs on PostgreSQL", "Jobs on SQLite with a past"
JOBS = 2000
PEER_JOBS = 1000
SLOW_PEER_JOBS = 300
SAMPLES = 150


def on_sqlite(platform: Platform) -> list[Figure]:
    def stock() -> float:
        return _peer(platform, "dbos_queue", "throughput", SLOW_PEER_JOBS, "stock")["jobs_per_second"]

    def tuned() -> float:
        return _peer(platform, "dbos_queue", "throughput", PEER_JOBS)["jobs_per_second"]

    ours = throughput(platform)
    return [
        compare(SQLITE, "No-op jobs end to end", "jobs/s", ours, "DBOS as it comes", stock),
        compare(SQLITE, "No-op jobs end to end", "jobs/s", ours, "DBOS tuned, one transaction", tuned),
        *_starts(
            SQLITE,
            lambda: latency(platform),
            "DBOS tuned",
            lambda: _peer(platform, "dbos_queue", "latency", SAMPLES // 2)["milliseconds"],
        ),
        *_starts(SQLITE, lambda: latency(platform), "a call of a warm Ray actor", lambda: _calls(platform), 1),
    ]


def with_a_past(empty: Platform, full: Platform) -> list[Figure]:
    """`full` was given 100,000 finished jobs and 20,000 that wait for what does not come."""
    return [
        compare(
            HISTORY,
            "No-op jobs end to end",
            "jobs/s",
            throughput(full),
            "the empty queue",
            throughput(empty),
            4,
        ),
        *_starts(HISTORY, lambda: latency(full), "the empty queue", lambda: latency(empty)),
        compare(
            HISTORY,
            "  … before 10,000 of a lower priority",
            "jobs/s",
            throughput(full, behind=10_000),
            "nothing behind",
            throughput(empty),
            1,
        ),
    ]


def on_postgres(platform: Platform, new_database: Callable[[], str]) -> list[Figure]:
    def deferred() -> float:
        return _peer(platform, "procrastinate_queue", "throughput", PEER_JOBS, new_database())["jobs_per_second"]

    def began() -> list[float]:
        return _peer(platform, "procrastinate_queue", "latency", SAMPLES // 2, new_database())["milliseconds"]

    return [
        compare(POSTGRES, "No-op jobs end to end", "jobs/s", throughput(platform), "procrastinate", deferred),
        *_starts(POSTGRES, lambda: latency(platform), "procrastinate", began),
    ]


def give_a_past(platform: Platform, finished: int = 100_000, waiting: int = 10_000) -> None:
    platform.wait_for(platform.submit(spec={"steps": 0}))
    command = [sys.executable, "-m", "tests.bench.history", str(finished), str(waiting)]
    platform.run(command)


def throughput(platform: Platform, jobs: int = JOBS, behind: int = 0) -> Callable[[], float]:
    return lambda: _peer(platform, "our_queue", "throughput", jobs, behind)["jobs_per_second"]


def latency(platform: Platform) -> list[float]:
    return _peer(platform, "our_queue", "latency", SAMPLES)["milliseconds"]


def _calls(platform: Platform) -> list[float]:
    return _peer(platform, "our_queue", "calls", SAMPLES)["milliseconds"]


def _starts(
    group: str,
    ours: Callable[[], list[float]],
    peer_name: str,
    peer: Callable[[], list[float]],
    rounds: int = 2,
) -> list[Figure]:
    """From before the transaction that enqueues until the first line of user code."""
    samples = [(ours(), peer()) for _ in range(rounds)]
    figures: list[Figure] = []
    for percent, word in ((50, "p50"), (95, "p95")):
        pairs = [(percentile(one, percent), percentile(other, percent)) for one, other in samples]
        figures.append(figure_of_pairs(group, f"Enqueue to first line, {word}", "ms", peer_name, pairs))
    return figures


def _peer(platform: Platform, module: str, *arguments: object) -> dict[str, Any]:
    """What that program measured, in a process of its own that sees the platform's settings."""
    command = [sys.executable, "-m", f"tests.bench.{module}", *map(str, arguments)]
    # Else Ray takes 127.0.0.1 for another address of this machine, and waits for itself there.
    platform.environment |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", **platform.ray_environment}
    return json.loads(platform.run(command).stdout.splitlines()[-1])
