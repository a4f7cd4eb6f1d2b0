"""`forgearr repo`: repositories that are watched, and the models that are made of them."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from cluster.cli.client import call
from cluster.cli.console import console as new_console
from cluster.cli.console import table
from cluster.cli.jobs import read_spec
from cluster.errors import InvalidRequest, NotFound

PATH = "/api/v1/repos"
SCHEMES = ("https://", "http://", "ssh://")

app = typer.Typer(name="repo", help="Manage repositories that are watched.", no_args_is_help=True)
console = new_console()

Where = Annotated[str, typer.Argument(help="Its name or id, or the folder that it lies in.")]


class NotRegistered(NotFound):
    """This folder is not registered: `forgearr repo add` does that."""


@app.command()
def add(
    where: Annotated[str, typer.Argument(help="A folder on this machine, or an address (https://, http://, ssh://).")],
    name: Annotated[str | None, typer.Option(help="What it is called. Default: as its folder.")] = None,
    branch: Annotated[str | None, typer.Option(help="Default: the one that is checked out.")] = None,
    model: Annotated[str | None, typer.Option(help="What its model is called. Default: as the repository.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A YAML file with what else to say: training, policy, and so on.")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value of that; may be repeated.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="A file with the token that its address asks for.")] = None,
    username: Annotated[str | None, typer.Option(help="Whose token it is.")] = None,
    secret_file: Annotated[
        Path | None, typer.Option(help="A file with the secret that its webhooks sign with.")
    ] = None,
    deploy: Annotated[bool, typer.Option(help="Serve each new model that is better.")] = True,
) -> None:
    """Register a repository. It is looked at now, and from then on watched."""
    elsewhere = where.startswith(SCHEMES)
    wanted = read_spec(recipe, settings or [])
    wanted |= {"url": where} if elsewhere else {"path": str(Path(where).expanduser().resolve())}
    wanted.setdefault("name", _name(where if elsewhere else wanted["path"]))
    told = {"name": name, "branch": branch, "model": model, "webhook_secret": _read(secret_file)}
    wanted |= {key: value for key, value in told.items() if value is not None}
    if token_file is not None:
        wanted["credentials"] = {"username": username, "token": _read(token_file)}
    elif username is not None:
        raise InvalidRequest("--username goes with --token-file.")
    if not deploy:
        wanted["auto_deploy"] = False
    made = call("POST", PATH, json=wanted)
    console.print(f"{made['name']} ({made['id']}) is watched. Its model is called {made['model']}.", soft_wrap=True)


@app.command("list")
def list_(as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """List repositories, and what was seen of them."""
    found = _all()
    if as_json:
        console.print_json(data=found)
        return
    rows = table("Name", "Where", "Branch", "Model", "Seen", "Trained", "Checked", "Trouble")
    for one in found:
        rows.add_row(
            one["name"] if one["enabled"] else f"{one['name']} (disabled)",
            escape(one["path"] or one["url"]),
            escape(one["branch"] or "-"),
            one["model"],
            (one["seen_commit"] or "-")[:10],
            (one["trained_commit"] or "-")[:10],
            (one["checked_at"] or "never")[:16].replace("T", " "),
            escape(one["check_error"] or ""),
        )
    console.print(rows)


@app.command()
def check(where: Where) -> None:
    """Look at a repository now, and have its model trained again if its policy says so."""
    asked = call("POST", f"{PATH}/{_find(where)}/check")
    typer.echo(f"Job {asked['job_id']} looks at it: forgearr jobs show {asked['job_id']}")


@app.command()
def retrain(
    where: Where,
    force: Annotated[bool, typer.Option("--force", help="Whatever its policy says.")] = False,
    deploy: Annotated[bool, typer.Option(help="Serve the new model, if it is better.")] = True,
) -> None:
    """Have the model of a repository trained again, if its policy says so; exit 1 if it does not."""
    wanted = {"repository": _find(where), "force": force, "auto_deploy": deploy}
    answer: dict[str, Any] = call("POST", "/v1/retrain", json=wanted)
    typer.echo(answer["reason"])
    if answer["job_id"] is None:
        raise typer.Exit(1)
    typer.echo(f"Job {answer['job_id']}: forgearr jobs watch {answer['job_id']}")


@app.command()
def remove(where: Where) -> None:
    """Forget a repository. Datasets and models made of it stay."""
    call("DELETE", f"{PATH}/{_find(where)}")
    typer.echo("Removed.")


def _all(**wanted: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while True:
        page = call("GET", PATH, params={"skip": len(found), "limit": 100, **wanted})
        found += page["items"]
        if len(found) >= page["total"]:
            return found


def _find(where: str) -> str:
    """The id of what is meant: a folder is told by its slash, or by being one."""
    folder = Path(where).expanduser()
    if "/" not in where and where != "." and not folder.is_dir():
        return where
    found = _all(path=str(folder.resolve()))
    if not found:
        if "/" not in where and where != ".":
            return where  # a name, beside which there happens to be a folder
        raise NotRegistered(f"{folder.resolve()} is not registered: `forgearr repo add {where}` does that.")
    return found[0]["id"]


def _name(where: str) -> str:
    last = where.rstrip("/").rpartition("/")[2].removesuffix(".git").lower()
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in last).strip("-") or "repo"


def _read(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}") from None
