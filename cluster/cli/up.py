"""`forgearr up` and `forgearr down`: start and stop an installation."""

import sys
import time
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Annotated

import typer

from cluster.cli.config import Overrides

if TYPE_CHECKING:
    import subprocess

POLL_SECONDS = 0.1


def up(
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Run in the background.")] = False,
    overrides: Overrides = None,
) -> None:
    """Start Forgearr: Ray, the gateway, the queue and MLflow. Ctrl-C stops everything."""
    import asyncio

    from cluster.cli.console import StepPrinter
    from cluster.settings import export_overrides, get_settings

    if overrides:
        export_overrides(overrides)
    get_settings()  # so that an invalid setting is reported before anything starts
    if detach:
        return _start_detached()

    from cluster.runtime import supervisor as runtime_supervisor

    asyncio.run(runtime_supervisor.run(StepPrinter()))


def down() -> None:
    """Stop Forgearr, and the processes that a crash left behind."""
    import asyncio

    from cluster.cli.console import StepPrinter
    from cluster.runtime import processes, run_state
    from cluster.runtime import supervisor as runtime_supervisor

    if not run_state.last_run() and not processes.marked_processes():
        typer.echo("Forgearr is not running.")
        return
    typer.echo("Stopping Forgearr …")
    asyncio.run(runtime_supervisor.stop(step_printer := StepPrinter()))
    typer.echo(f"Forgearr is stopped ({step_printer.seconds:.1f} s).")


def _start_detached() -> None:
    """Start the supervisor in a session of its own, and print its output until it is ready."""
    import subprocess

    from cluster import logs
    from cluster.runtime import run_state
    from cluster.runtime import supervisor as runtime_supervisor

    run_state.require_not_running()
    path = logs.folder() / "up.log"
    path.write_text("")
    with path.open("a") as output:  # it is emptied when it has grown large
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", "up"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    with path.open() as text:
        last = ""
        for line in _lines_until_ready(text, supervisor):
            if last:
                typer.echo(last)
            last = line
    if supervisor.poll() is not None:
        raise runtime_supervisor.StartFailed(last or f"Forgearr ended without a message; {path} may have one.")
    typer.echo(last)
    run = run_state.current_run()
    if run:
        typer.echo(f"API: {run.url}/docs. `forgearr status` shows each part, `forgearr down` stops all.")


def _lines_until_ready(text: IO[str], supervisor: "subprocess.Popen[bytes]") -> Iterator[str]:
    from cluster.runtime import run_state

    is_done = False
    while not is_done:
        run = run_state.current_run()
        is_done = supervisor.poll() is not None or bool(run and run.pid == supervisor.pid and run.ready)
        yield from (line.rstrip() for line in text if line.strip())
        if not is_done:
            time.sleep(POLL_SECONDS)
