"""`forgearr repo`: manage watched repositories, and retrain their models."""

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

app = typer.Typer(name="repo", help="Manage watched repositories.", no_args_is_help=True)
console = new_console()

RepositoryArgument = Annotated[str, typer.Argument(help="Name, id or folder of the repository.")]


class NotRegistered(NotFound):
    """This folder is not registered; `forgearr repo add` registers it."""


@app.command()
def add(
    where: Annotated[str, typer.Argument(help="A folder on this machine, or a URL (https://, http://, ssh://).")],
    name: Annotated[str | None, typer.Option(help="Name of the repository. Default: the name of its folder.")] = None,
    branch: Annotated[str | None, typer.Option(help="Default: the one that is checked out.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of its model. Default: the name of the repository.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML file with more fields of the repository: training, policy and others.")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="One field, key=value; may be repeated.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="File with the token for the URL.")] = None,
    username: Annotated[str | None, typer.Option(help="User name for the token.")] = None,
    secret_file: Annotated[Path | None, typer.Option(help="File with the secret that signs its webhooks.")] = None,
    deploy: Annotated[bool, typer.Option(help="Serve each new model that is better.")] = True,
) -> None:
    """Register a repository. It is checked now, and watched from then on."""
    is_url = where.startswith(SCHEMES)
    body = read_spec(recipe, settings or [])
    body |= {"url": where} if is_url else {"path": str(Path(where).expanduser().resolve())}
    body.setdefault("name", _default_name(where if is_url else body["path"]))
    options = {"name": name, "branch": branch, "model": model, "webhook_secret": _read_secret(secret_file)}
    body |= {key: value for key, value in options.items() if value is not None}
    if token_file is not None:
        body["credentials"] = {"username": username, "token": _read_secret(token_file)}
    elif username is not None:
        raise InvalidRequest("--username needs --token-file.")
    if not deploy:
        body["auto_deploy"] = False
    repository = call("POST", API_PATH, json=body)
    console.print(
        f"{repository['name']} ({repository['id']}) is watched. The name of its model is {repository['model']}.",
        soft_wrap=True,
    )


@app.command("list")
def list_(as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """List repositories, and the results of their last checks."""
    repositories = _list_repositories()
    if as_json:
        console.print_json(data=repositories)
        return
    rows = table("Name", "Location", "Branch", "Model", "Seen", "Trained", "Checked", "Error")
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
    """Check a repository now, and retrain its model if its policy says so."""
    accepted = call("POST", f"{API_PATH}/{_resolve_id(where)}/check")
    typer.echo(f"Job {accepted['job_id']} checks it: forgearr jobs show {accepted['job_id']}")


@app.command()
def retrain(
    where: RepositoryArgument,
    force: Annotated[bool, typer.Option("--force", help="Retrain, whatever the policy says.")] = False,
    deploy: Annotated[bool, typer.Option(help="Serve the new model, if it is better.")] = True,
) -> None:
    """Retrain the model of a repository if its policy says so. Exit 1 if it does not."""
    body = {"repository": _resolve_id(where), "force": force, "auto_deploy": deploy}
    result: dict[str, Any] = call("POST", "/v1/retrain", json=body)
    typer.echo(result["reason"])
    if result["job_id"] is None:
        raise typer.Exit(1)
    typer.echo(f"Job {result['job_id']}: forgearr jobs wait {result['job_id']}")


@app.command()
def remove(where: RepositoryArgument) -> None:
    """Remove a repository. Its datasets and models stay."""
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
    """Return the id of a repository's folder; a name or an id is returned as it is.

    An existing folder, and any text with a slash, is taken for a folder.
    """
    folder = Path(where).expanduser()
    if "/" not in where and where != "." and not folder.is_dir():
        return where
    repositories = _list_repositories(path=str(folder.resolve()))
    if not repositories:
        if "/" not in where and where != ".":
            return where  # a name; a folder of the same name happens to exist
        raise NotRegistered(f"{folder.resolve()} is not registered; `forgearr repo add {where}` registers it.")
    return repositories[0]["id"]


def _default_name(where: str) -> str:
    last = where.rstrip("/").rpartition("/")[2].removesuffix(".git").lower()
    characters = (character if character.isascii() and character.isalnum() else "-" for character in last)
    return "".join(characters).strip("-") or "repo"


def _read_secret(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}") from None
