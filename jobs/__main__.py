"""`python -m jobs submit KIND --config FILE --wait`: submit a job from inside the cluster.

It is for `ray job submit -- python -m jobs submit …`. It uses the database directly, so it needs no server and no key.
It exits with 1 if a job that it waits for does not succeed.
"""

import argparse
import asyncio
import json
import logging
import os
import sys
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cluster.db import get_database
from cluster.dotlist import assign
from cluster.errors import ForgearrError
from cluster.ownership import system
from cluster.settings import get_settings
from jobs import journal, queue
from jobs.queue import JobRequest
from jobs.states import FINISHED, State
from jobs.tables import Job

POLL_SECONDS = 0.5


def main() -> None:
    arguments = _parser().parse_args()
    try:
        sys.exit(asyncio.run(_submit(arguments)))
    except (ForgearrError, OSError, yaml.YAMLError, ValidationError) as error:
        sys.exit(f"error: {getattr(error, 'message', error)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jobs", description="Add jobs to Forgearr's queue.")
    submit = parser.add_subparsers(required=True, metavar="COMMAND").add_parser("submit", help="submit a job")
    submit.add_argument("kind", help="kind of job")
    submit.add_argument("--config", type=Path, help="YAML or JSON file with the spec; configs/… may be a shipped one")
    submit.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a value of the spec")
    submit.add_argument("--priority", type=int, default=0, help="higher ones run first")
    submit.add_argument("--depends-on", action="append", default=[], metavar="JOB", help="job that must succeed first")
    submit.add_argument("--wait", action="store_true", help="follow the job; exit 1 unless it succeeds")
    return parser


async def _submit(arguments: argparse.Namespace) -> int:
    _join_cluster()
    spec = _read_spec(arguments.config) if arguments.config else {}
    for setting in arguments.set:
        assign(spec, setting)
    request = JobRequest(kind=arguments.kind, spec=spec, priority=arguments.priority, depends_on=arguments.depends_on)
    async with get_database().transaction() as session:
        job = await queue.enqueue(session, request, system(os.environ.get("USER", "cluster")))
    _print_line(job.id)
    return await _follow(job.id) if arguments.wait else 0


def _read_spec(config: Path) -> dict[str, Any]:
    """Read a spec. configs/… is also found where Forgearr is installed: a Ray job has another working folder."""
    shipped = Path(str(files("configs"))).parent / config
    path = shipped if config.parts[:1] == ("configs",) and not config.exists() else config
    return yaml.safe_load(path.read_text()) or {}


async def _follow(job_id: str) -> int:
    """Print the job's journal until it ends."""
    cursor = 0
    while True:
        async with get_database().read_transaction() as session:
            job = await session.get_one(Job, job_id)
            page = await journal.read(session, job_id, cursor)
        for event in page:
            cursor = event.id
            _print_line(f"{event.created_at:%H:%M:%S} {event.type:10} {json.dumps(event.data)}")
        if page:
            continue
        if job.state in FINISHED:
            _print_line(json.dumps(job.result if job.state == State.SUCCEEDED else job.error))
            return 0 if job.state == State.SUCCEEDED else 1
        await asyncio.sleep(POLL_SECONDS)


def _join_cluster() -> None:
    """Inside a Ray job, join its cluster, so that the dispatcher is woken at once."""
    if "RAY_ADDRESS" not in os.environ:
        return
    import ray

    with suppress(ConnectionError):
        ray.init(namespace=get_settings().ray_namespace, log_to_driver=False, logging_level=logging.WARNING)


def _print_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


main()
