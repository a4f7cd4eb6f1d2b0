"""The `forgearr` command. Each group of commands is a module here, which imports what it needs when it is called."""

import sys
from typing import Annotated

import typer

from cluster.cli import config, demo, deploy, git_hooks, jobs, models, repo, train, up
from cluster.cli import status as cli_status
from cluster.cli.local import backup, key, keys, user
from cluster.errors import ForgearrError

app = typer.Typer(
    help="Train, ship and run a private assistant on your own machines.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("up")(up.up)
app.command("down")(up.down)
app.command("status")(cli_status.status)
app.command("doctor")(cli_status.doctor)
app.command("logs")(cli_status.logs)
app.command("access")(cli_status.access)
app.command("backup")(backup.backup)
app.command("restore")(backup.restore)
app.command("train")(train.train)
app.command("demo")(demo.demo)
app.command("models")(models.models)
app.command("chat")(models.chat)
app.command("deploy")(deploy.deploy)
app.command("rollback")(deploy.rollback)
app.command("retire")(deploy.retire)
app.add_typer(config.app)
app.add_typer(user.app)
app.add_typer(key.app)
app.add_typer(keys.app)
app.add_typer(jobs.app, name="jobs")
app.add_typer(repo.app)
app.add_typer(git_hooks.app)


def main() -> None:
    """Run one command. Of an error that Forgearr raises on purpose, only the message is printed, not the traceback."""
    try:
        app()
    except ForgearrError as error:
        typer.secho(error.message, fg=typer.colors.RED, err=True)
        sys.exit(1)


def _show_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"Forgearr {version('forgearr')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass
