"""`forgearr config`: show the settings in force."""

from typing import Annotated

import typer

app = typer.Typer(name="config", help="Show the settings.", no_args_is_help=True)

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting for this run; may be repeated.", show_default=False),
]


@app.callback()
def group() -> None:
    """Show the settings."""


@app.command()
def show(overrides: Overrides = None) -> None:
    """Print every setting, its value and where it comes from. Secrets are masked."""
    from rich.text import Text

    from cluster.cli.console import console, table
    from cluster.settings import DEFAULTS, load_settings

    rows = table("setting", "value", "from")
    for setting, value, origin in load_settings(overrides or ()).rows():
        style = None if origin == DEFAULTS else "cyan"
        rows.add_row(setting, Text(value), Text(origin), style=style)
    console().print(rows)
