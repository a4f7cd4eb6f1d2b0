"""`forgearr deploy`, `forgearr rollback` and `forgearr retire`: change which version of a model is served."""

from typing import Annotated

import typer

from cluster.cli.client import call
from cluster.cli.console import console as make_console
from cluster.cli.jobs import wait_until_ended


def deploy(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    version: Annotated[int, typer.Argument(min=1)],
    force: Annotated[bool, typer.Option("--force", help="Even if it did not pass its validation.")] = False,
) -> None:
    """Serve a version of a model as NAME:latest. Exit 1 if that fails."""
    job = call("POST", f"/api/v1/models/{name}/deploy", json={"version": version, "force": force})
    wait_until_ended([job["id"]])


def rollback(name: Annotated[str, typer.Argument(help="Name of the model.")]) -> None:
    """Serve the version that was served before this one, at once."""
    result = call("POST", f"/api/v1/models/{name}/rollback")
    _print_switch(f"{name}:latest is v{result['version']} again; it was v{result['previous']}.", result["warning"])


def retire(name: Annotated[str, typer.Argument(help="Name of the model.")]) -> None:
    """Serve no version of a model any more, at once. Its versions stay."""
    result = call("POST", f"/api/v1/models/{name}/retire")
    _print_switch(f"{name}:latest is no version any more; it was v{result['version']}.", result["warning"])


def _print_switch(sentence: str, warning: str | None) -> None:
    console = make_console()
    console.print(sentence)
    if warning:
        console.print(warning, style="yellow", soft_wrap=True)
