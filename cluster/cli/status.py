"""`forgearr status`, `access`, `doctor` and `logs`: show the components and their passwords, checks, and the logs."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cluster.logs import Line
    from cluster.runtime.run_state import RunState

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
STATE_STYLES = {"running": "green", "off": "dim", "starting": "yellow", "degraded": "yellow"}
LEVEL_STYLES = {"DEBUG": "dim", "INFO": "green", "WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}
CHECK_STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}


def status(as_json: AsJson = False) -> None:
    """Show the state of each component. Exit 0 if all are healthy."""
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


def access(
    shell: Annotated[bool, typer.Option("--shell", help="Print variables for a shell, for `eval`.")] = False,
) -> None:
    """Show the passwords of MLflow's pages and Ray's dashboard, as far as they are of this installation."""
    import shlex

    from cluster.errors import Unavailable
    from cluster.runtime import run_state

    run = run_state.current_run()
    if run is None:
        raise Unavailable("Forgearr does not run; `forgearr up` starts it.")
    if shell:
        for name, value in _client_variables(run).items():
            typer.echo(f"export {name}={shlex.quote(value)}")
    else:
        _show_access(run)


def doctor() -> None:
    """Check this machine and this installation, and suggest fixes."""
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
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Also print new lines as they are written.")] = False,
    component: Annotated[str | None, typer.Option(help="Only lines of this component.", show_default=False)] = None,
    level: Annotated[str | None, typer.Option(help="Only lines of this level or above.", show_default=False)] = None,
    count: Annotated[int, typer.Option("-n", min=0, help="Number of past lines to print.")] = 50,
) -> None:
    """Print the logs of all components, in the order of time."""
    from cluster import logs

    if level and level.upper() not in logs.LEVELS:
        raise typer.BadParameter(f"one of {', '.join(logs.LEVELS)}", param_hint="--level")
    matches = logs.line_filter(component, level.upper() if level else None)
    for line in logs.recent(count, matches):
        _print_line(line)
    if follow:
        for line in logs.follow(matches):
            _print_line(line)


def _show_access(run: "RunState") -> None:
    from cluster import secrets

    if run.has_own_mlflow:
        typer.echo(f"MLflow         {run.mlflow_uri}")
        typer.echo(f"  user         {secrets.MLFLOW_USER}")
        typer.echo(f"  password     {secrets.mlflow_password()}")
    if run.dashboard_url:
        typer.echo(f"Ray dashboard  {run.dashboard_url}")
        typer.echo(f"  token        {secrets.ray_token_path().read_text()}")


def _client_variables(run: "RunState") -> dict[str, str]:
    """Return the variables that MLflow's and Ray's own clients read."""
    from cluster import secrets
    from cluster.runtime import embedded

    variables: dict[str, str] = {}
    if run.mlflow_uri and run.has_own_mlflow:
        variables["MLFLOW_TRACKING_URI"] = run.mlflow_uri
        variables["MLFLOW_TRACKING_USERNAME"] = secrets.MLFLOW_USER
        variables["MLFLOW_TRACKING_PASSWORD"] = secrets.mlflow_password()
    if run.dashboard_url:
        variables["RAY_API_SERVER_ADDRESS"] = run.dashboard_url
        variables |= embedded.ray_credentials()
    return variables


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
