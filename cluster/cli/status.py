"""`forgearr status`, `doctor` and `logs`: how it is, what is wrong, and what happened."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cluster.logs import Line

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
STATE_STYLES = {"running": "green", "off": "dim", "starting": "yellow", "degraded": "yellow"}
LEVEL_STYLES = {"DEBUG": "dim", "INFO": "green", "WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}
CHECK_STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}


def status(as_json: AsJson = False) -> None:
    """Show each component. The exit code is 0 when all are well."""
    from cluster.cli.console import console, table
    from cluster.runtime import status as statuses
    from cluster.settings import get_settings

    components = statuses.collect(get_settings())
    if as_json:
        typer.echo(json.dumps([asdict(component) for component in components], indent=2))
    else:
        rows = table("component", "state", "address", "uptime", "version")
        for component in components:
            state = f"[{STATE_STYLES.get(component.state, 'red')}]{component.state}[/]"
            rows.add_row(component.component, state, component.address, _duration(component.uptime), component.version)
        console().print(rows)
    raise typer.Exit(0 if all(component.is_healthy for component in components) else 1)


def doctor() -> None:
    """Check this machine and this installation, and say how to fix what is wrong."""
    from cluster.cli.console import console
    from cluster.runtime.doctor import run_checks
    from cluster.settings import get_settings

    output = console()
    failed = False
    for result in run_checks(get_settings()):
        output.print(f"[{CHECK_STYLES[result.level]}]{result.level:<4}[/] {result.subject:<10}", result.text)
        if result.fix:
            output.print(f"{'':15} [dim]→[/]", result.fix)
        failed = failed or result.level == "fail"
    raise typer.Exit(1 if failed else 0)


def logs(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new lines as they come.")] = False,
    component: Annotated[str | None, typer.Option(help="Only this component's lines.", show_default=False)] = None,
    level: Annotated[str | None, typer.Option(help="Only lines this severe or more.", show_default=False)] = None,
    count: Annotated[int, typer.Option("-n", min=0, help="How many of the last lines to show.")] = 50,
) -> None:
    """Show what all components logged, as one story."""
    from cluster import logs

    if level and level.upper() not in logs.LEVELS:
        raise typer.BadParameter(f"one of {', '.join(logs.LEVELS)}", param_hint="--level")
    matches = logs.line_filter(component, level.upper() if level else None)
    for line in logs.recent(count, matches):
        _print_line(line)
    if follow:
        for line in logs.follow(matches):
            _print_line(line)


def _print_line(line: "Line") -> None:
    from rich.text import Text

    from cluster.cli.console import console

    context = [str(line[name]) for name in ("job_id", "request_id") if line.get(name)]
    text = Text.assemble(
        (f"{line['timestamp'][:23].replace('T', ' ')} ", "dim"),
        (f"{line['level']:<7} ", LEVEL_STYLES.get(line["level"], "")),
        (f"{line['component']:<10} ", "cyan"),
        line["message"],
        (f"  [{' '.join(context)}]" if context else "", "dim"),
    )
    console().print(text, soft_wrap=True)
    if line.get("exception"):
        console().print(Text(line["exception"], "dim"), soft_wrap=True)


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours >= 48:
        return f"{hours // 24} d"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min" if minutes else f"{int(seconds)} s"
