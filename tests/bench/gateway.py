"""The gateway's no-op route, next to the same route of the smallest FastAPI application on bare uvicorn."""

import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import httpx
import psutil

from tests.bench.figures import Figure, compare, figure_of_pairs
from tests.bench.wrk import requests_per_second
from tests.support.platform import Platform, unused_ports
from tests.support.waiting import eventually

GROUP = "Gateway"
GATEWAY = "ray::ServeReplica:forgearr:gateway"
ROUTE = "/api/v1/ping"
CONNECTIONS = 16
SECONDS = 5
POST_CONNECTIONS = 8


def ping(platform: Platform, replicas: int, rounds: int = 3) -> list[Figure]:
    with _uvicorn(platform, "tests.bench.bare_app:app", workers=replicas) as bare:
        figure = compare(
            GROUP,
            f"GET {ROUTE}, {_count(replicas, 'replica')}",
            "requests/s",
            lambda: _load(platform.url),
            f"bare uvicorn, {_count(replicas, 'worker')}",
            lambda: _load(bare),
            rounds,
        )
    return [figure]


def layers(platform: Platform, rounds: int = 2) -> list[Figure]:
    """The same route with one part after the other taken away, so that each shows what it costs."""
    with (
        _uvicorn(platform, "tests.bench.bare_app:app") as bare,
        _uvicorn(platform, "tests.bench.gateway:full_app", "--factory") as full,
    ):
        replica = _replica_url(platform)
        names = {
            "the replica asked directly, without HAProxy": replica,
            "our application on bare uvicorn, without Ray Serve": full,
        }
        rates = [{name: _load(url) for name, url in {**names, "": bare}.items()} for _ in range(rounds)]
    return [
        figure_of_pairs(
            GROUP,
            f"  … {name}",
            "requests/s",
            "bare uvicorn, 1 worker",
            [(rate[name], rate[""]) for rate in rates],
        )
        for name in names
    ]


def post_jobs(platform: Platform, rounds: int = 2) -> Figure:
    """Jobs put into the queue one request at a time, while the dispatcher runs them."""
    script = Path(__file__).parent / "post_job.lua"
    rates: list[float] = []
    for _ in range(rounds):
        rates.append(requests_per_second(f"{platform.url}/api/v1/jobs", POST_CONNECTIONS, SECONDS, script))
        eventually(lambda: platform.count("queued") == platform.count("running") == 0)
    return Figure(GROUP, "POST /api/v1/jobs at 8 connections", "requests/s", median(rates), rounds=list(rates))


def full_app() -> object:
    from serve.app import create_app

    return create_app()


def _load(url: str) -> float:
    return requests_per_second(f"{url}{ROUTE}", CONNECTIONS, SECONDS)


@contextmanager
def _uvicorn(platform: Platform, application: str, *options: str, workers: int = 1) -> Generator[str]:
    (port,) = unused_ports(1)
    command = [sys.executable, "-m", "uvicorn", application, *options, "--host=127.0.0.1", f"--port={port}"]
    command += [
        f"--workers={workers}",
        "--loop=uvloop",
        "--http=httptools",
        "--no-access-log",
        "--log-level=warning",
    ]
    server = subprocess.Popen(command, env=platform.environment)
    url = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: httpx.get(url + ROUTE).is_success)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=10)


def _replica_url(platform: Platform) -> str:
    """Where the replica itself listens: of its ports, the one that answers."""
    (replica,) = platform.processes(GATEWAY)
    ports = [one.laddr.port for one in replica.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    for port in ports:
        url = f"http://127.0.0.1:{port}"
        try:
            if httpx.get(url + ROUTE, timeout=2).is_success:
                return url
        except httpx.HTTPError:
            continue  # gRPC listens there
    raise AssertionError(f"none of the replica's ports {ports} answers")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
