"""`forgearr jobs`: submit, list, watch and control jobs."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from cluster.cli.client import RetryPolicy, call, poll, stream_events
from cluster.cli.console import console as new_console
from cluster.cli.console import table
from cluster.dotlist import assign
from cluster.errors import InvalidRequest

app = typer.Typer(no_args_is_help=True, help="Submit, watch and control jobs.")
console = new_console()

FINISHED_STATES = {"succeeded", "failed", "cancelled"}
COLORS = {"succeeded": "green", "failed": "red", "cancelled": "yellow", "running": "cyan", "paused": "magenta"}
MAX_BARS = 12
"""Up to this many jobs have a progress bar each. More jobs share one."""
POLL_SECONDS = 1.0

JobIds = Annotated[list[str], typer.Argument(metavar="JOB…")]


@app.command()
def submit(
    kind: Annotated[str, typer.Argument(help="Kind of job; GET /api/v1/jobs/kinds lists them.")],
    config: Annotated[Path | None, typer.Option(help="YAML or JSON file with the spec.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value of the spec; may be repeated.")] = None,
    priority: Annotated[int, typer.Option(help="Higher ones run first.")] = 0,
    run_after: Annotated[str | None, typer.Option(help="Not before this time (ISO 8601 with zone).")] = None,
    depends_on: Annotated[list[str] | None, typer.Option(help="Job that must succeed first; may be repeated.")] = None,
    tracked: Annotated[bool | None, typer.Option("--tracked/--untracked", help="Record it in MLflow.")] = None,
    idempotency_key: Annotated[str | None, typer.Option(help="The same key creates the job only once.")] = None,
    count: Annotated[int, typer.Option(min=1, max=10_000, help="Number of jobs to create.")] = 1,
    wait: Annotated[bool, typer.Option("--wait", help="Wait with a progress bar; exit 1 unless all succeed.")] = False,
) -> None:
    """Add a job to the queue."""
    request = {
        "kind": kind,
        "spec": read_spec(config, settings or []),
        "priority": priority,
        "run_after": run_after,
        "depends_on": depends_on or [],
        "tracked": tracked,
    }
    jobs: list[str] = []
    for number in range(count):
        key = f"{idempotency_key}-{number}" if idempotency_key and count > 1 else idempotency_key
        headers = {"Idempotency-Key": key} if key else {}
        jobs.append(call("POST", "/api/v1/jobs", json=request, headers=headers)["id"])
    if not wait:
        console.print("\n".join(jobs))
        return
    wait_until_ended(jobs)


@app.command("list")
def list_jobs(
    state: Annotated[str | None, typer.Option(help="Only jobs in this state.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only jobs of this kind.")] = None,
    parent: Annotated[str | None, typer.Option(help="Only children of this job.")] = None,
    limit: Annotated[int, typer.Option("-n", "--limit", min=1, max=100)] = 20,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """List jobs, the newest first."""
    filters = {"state": state, "kind": kind, "parent_id": parent, "limit": limit}
    page = call("GET", "/api/v1/jobs", params={name: value for name, value in filters.items() if value is not None})
    if as_json:
        console.print_json(data=page)
        return
    rows = table("Job", "Kind", "State", "%", "Attempt", "By", "Created", "Note")
    for column in rows.columns[:-1]:
        column.no_wrap = True
    for job in page["items"]:
        note = job["waiting_for"] and f"waits for {job['waiting_for']}"
        note = note or (job["error"] and job["error"]["message"]) or job["phase"] or ""
        attempt = f"{job['attempt']}/{job['max_attempts']}"
        created = job["created_at"][:19].replace("T", " ")
        progress = f"{job['progress']:.0f}"
        rows.add_row(job["id"], job["kind"], _colored(job), progress, attempt, job["created_by"], created, escape(note))
    console.print(rows)
    if page["total"] > len(page["items"]):
        console.print(f"{len(page['items'])} of {page['total']}", style="dim")


@app.command()
def show(job: str) -> None:
    """Show a job with all its fields."""
    console.print_json(data=call("GET", f"/api/v1/jobs/{job}"))


@app.command()
def logs(
    job: str, follow_on: Annotated[bool, typer.Option("-f", "--follow", help="Follow it until the job ends.")] = False
) -> None:
    """Print the log of a job."""
    if follow_on:
        for _, line in stream_events(f"/api/v1/jobs/{job}/logs"):
            _print_line(line)
        return
    after: int | None = 0
    while after is not None:
        page = call("GET", f"/api/v1/jobs/{job}/logs", params={"after": after, "limit": 500})
        for line in page["items"]:
            _print_line(line)
        after = page["next_after"]


@app.command()
def cancel(jobs: JobIds) -> None:
    """Cancel jobs and their children."""
    _post_action(jobs, "cancel")


@app.command()
def pause(jobs: JobIds) -> None:
    """Pause jobs: queued ones at once, running ones at their next checkpoint."""
    _post_action(jobs, "pause")


@app.command()
def resume(jobs: JobIds) -> None:
    """Resume paused jobs."""
    _post_action(jobs, "resume")


@app.command()
def retry(jobs: JobIds) -> None:
    """Try failed or cancelled jobs again, from their last checkpoint."""
    _post_action(jobs, "retry")


@app.command()
def wait(jobs: JobIds) -> None:
    """Wait for jobs with a progress bar; exit 1 unless all succeed."""
    wait_until_ended(jobs)


def read_spec(config: Path | None, settings: list[str]) -> dict[str, Any]:
    """Read a spec from a file, and apply the assignments of --set to it."""
    try:
        spec: Any = yaml.safe_load(config.read_text()) if config else {}
    except (OSError, yaml.YAMLError) as error:
        raise InvalidRequest(f"{config} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(spec, dict):
        raise InvalidRequest(f"{config} must contain the spec as a mapping of names to values.")
    for setting in settings:
        assign(spec, setting)
    return spec


def _post_action(jobs: list[str], action: str) -> None:
    for job in jobs:
        updated = call("POST", f"/api/v1/jobs/{job}/{action}")
        console.print(f"{updated['id']}  {_colored(updated)}")


def wait_until_ended(jobs: list[str]) -> None:
    """Show progress until all jobs have ended, print the results, and exit: with 1 unless all succeeded."""
    ended = _watch(jobs)
    failures = [job for job in ended.values() if job["state"] != "succeeded"]
    if len(jobs) == 1 and not failures:
        console.print_json(json.dumps(ended[jobs[0]]["result"]))
    for job in failures[:MAX_BARS]:
        error = job["error"] or {}
        console.print(f"{job['id']} {_colored(job)}: {escape(error.get('message', ''))}", soft_wrap=True)
    console.print(f"{len(ended) - len(failures)} of {len(ended)} succeeded.")
    sys.exit(1 if failures else 0)


def _watch(jobs: list[str]) -> dict[str, dict[str, Any]]:
    """Show progress bars until all jobs have ended, and return the ended jobs."""
    ended: dict[str, dict[str, Any]] = {}
    retry_policy = RetryPolicy()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        shared_bar = progress.add_task(f"{len(jobs)} jobs", total=len(jobs), note="") if len(jobs) > MAX_BARS else None
        bars = {} if shared_bar is not None else {job: progress.add_task(job, total=100, note="") for job in jobs}
        while len(ended) < len(jobs):
            for job_id in [job for job in jobs if job not in ended]:
                job = poll(f"/api/v1/jobs/{job_id}", retry_policy)
                if job["state"] in FINISHED_STATES:
                    ended[job_id] = job
                if bars:
                    waiting = job["waiting_for"] and f"waits for {job['waiting_for']}"
                    note = waiting or (_colored(job) if job["state"] != "running" else job["phase"] or "")
                    progress.update(bars[job_id], completed=job["progress"], note=note)
            if shared_bar is not None:
                progress.update(shared_bar, completed=len(ended), note=f"{len(ended)} finished")
            time.sleep(0 if len(ended) == len(jobs) else POLL_SECONDS)
    return ended


def _colored(job: dict[str, Any]) -> str:
    color = COLORS.get(job["state"], "white")
    return f"[{color}]{job['state']}[/{color}]"


def _print_line(line: dict[str, Any]) -> None:
    console.print(f"{line['timestamp'][11:23]} {line['level']:7} {line['message']}", markup=False)
