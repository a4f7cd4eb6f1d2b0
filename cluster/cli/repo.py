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

API_PATH = "/api/v1/repos"
SCHEMES = ("https://", "http://", "ssh://")

app = typer.Typer(name="repo", help="Manage repositories that are watched.", no_args_is_help=True)
console = new_console()

RepositoryArgument = Annotated[str, typer.Argument(help="Its name or id, or the folder that it lies in.")]


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
    is_url = where.startswith(SCHEMES)
    body = read_spec(recipe, settings or [])
    body |= {"url": where} if is_url else {"path": str(Path(where).expanduser().resolve())}
    body.setdefault("name", _default_name(where if is_url else body["path"]))
    options = {"name": name, "branch": branch, "model": model, "webhook_secret": _read_secret(secret_file)}
    body |= {key: value for key, value in options.items() if value is not None}
    if token_file is not None:
        body["credentials"] = {"username": username, "token": _read_secret(token_file)}
    elif username is not None:
        raise InvalidRequest("--username goes with --token-file.")
    if not deploy:
        body["auto_deploy"] = False
    repository = call("POST", API_PATH, json=body)
    console.print(
        f"{repository['name']} ({repository['id']}) is watched. Its model is called {repository['model']}.",
        soft_wrap=True,
    )


@app.command("list")
def list_(as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """List repositories, and what was seen of them."""
    repositories = _list_repositories()
    if as_json:
        console.print_json(data=repositories)
        return
    rows = table("Name", "Where", "Branch", "Model", "Seen", "Trained", "Checked", "Trouble")
    for repository in repositories:
        rows.add_row(
            repository["name"] if repository["enabled"] else f"{repository['name']} (disabled)",
            escape(repository["path"] or repository["url"]),
            escape(repository["branch"] or "-"),
            repository["model"],
            (repository["seen_commit"] or "-")[:10],
            (repository["trained_commit"] or "-")[:10],
            (repository["checked_at"] or "never")[:16].replace("T", " "),
            escape(repository["check_error"] or ""),
        )
    console.print(rows)


@app.command()
def check(where: RepositoryArgument) -> None:
    """Look at a repository now, and have its model trained again if its policy says so."""
    accepted = call("POST", f"{API_PATH}/{_resolve_id(where)}/check")
    typer.echo(f"Job {accepted['job_id']} looks at it: forgearr jobs show {accepted['job_id']}")


@app.command()
def retrain(
    where: RepositoryArgument,
    force: Annotated[bool, typer.Option("--force", help="Whatever its policy says.")] = False,
    deploy: Annotated[bool, typer.Option(help="Serve the new model, if it is better.")] = True,
) -> None:
    """Have the model of a repository trained again, if its policy says so; exit 1 if it does not."""
    body = {"repository": _resolve_id(where), "force": force, "auto_deploy": deploy}
    result: dict[str, Any] = call("POST", "/v1/retrain", json=body)
    typer.echo(result["reason"])
    if result["job_id"] is None:
        raise typer.Exit(1)
    typer.echo(f"Job {result['job_id']}: forgearr jobs watch {result['job_id']}")


@app.command()
def remove(where: RepositoryArgument) -> None:
    """Forget a repository. Datasets and models made of it stay."""
    call("DELETE", f"{API_PATH}/{_resolve_id(where)}")
    typer.echo("Removed.")


def _list_repositories(**filters: str) -> list[dict[str, Any]]:
    repositories: list[dict[str, Any]] = []
    while True:
        page = call("GET", API_PATH, params={"skip": len(repositories), "limit": 100, **filters})
        repositories += page["items"]
        if len(repositories) >= page["total"]:
            return repositories


def _resolve_id(where: str) -> str:
    """The id of what is meant: a folder is told by its slash, or by being one."""
    folder = Path(where).expanduser()
    if "/" not in where and where != "." and not folder.is_dir():
        return where
    repositories = _list_repositories(path=str(folder.resolve()))
    if not repositories:
        if "/" not in where and where != ".":
            return where  # a name, beside which there happens to be a folder
        raise NotRegistered(f"{folder.resolve()} is not registered: `forgearr repo add {where}` does that.")
    return repositories[0]["id"]


def _default_name(where: str) -> str:
    last = where.rstrip("/").rpartition("/")[2].removesuffix(".git").lower()
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in last).strip("-") or "repo"


def _read_secret(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}") from None
