"""`forgearr hook`: manage git hooks that make Forgearr check a repository after each commit, merge or push.

The hooks run in the background: they never delay git or make it fail, also when no server runs.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import Conflict, InvalidRequest

HOOKS = ("post-commit", "post-merge", "post-receive")
MARKER = "# Made by `forgearr hook install`; `forgearr hook remove` takes it away."
BACKUP_SUFFIX = ".before-forgearr"
LOG_NAME = "forgearr-hook.log"

app = typer.Typer(name="hook", help="Manage git hooks that report new commits.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="The folder of a repository on this machine.", metavar="REPO")]


class HookExists(Conflict):
    """An existing hook would be lost."""


@app.command()
def install(
    folder: Folder,
    repository: Annotated[
        str | None, typer.Option(help="Name or id of the repository. Default: the one registered by this folder.")
    ] = None,
    key_file: Annotated[Path | None, typer.Option(help="File with an API key, if the server requires one.")] = None,
) -> None:
    """Check this repository after each commit, merge or push. Existing hooks are still called."""
    if key_file is not None and not key_file.expanduser().is_file():
        raise InvalidRequest(f"There is no file {key_file}.")
    hooks = _hooks_folder(folder)
    script = _script(repository or str(folder.expanduser().resolve()), key_file, hooks)
    hooks.mkdir(exist_ok=True)
    for name in HOOKS:
        hook, backup = hooks / name, hooks / f"{name}{BACKUP_SUFFIX}"
        if _exists(hook) and not _is_ours(hook):
            if _exists(backup):
                raise HookExists(f"Both {hook} and {backup} exist; remove one of them.")
            hook.rename(backup)
        draft = hooks / f"{name}.forgearr-new"
        draft.write_text(script)
        draft.chmod(0o755)
        draft.replace(hook)
    typer.echo(f"Installed {', '.join(HOOKS)} in {hooks}. Their output is in {hooks / LOG_NAME}.")


@app.command()
def remove(folder: Folder) -> None:
    """Remove these hooks, and restore the ones that were there before."""
    hooks = _hooks_folder(folder)
    removed = [name for name in HOOKS if _is_ours(hooks / name)]
    for name in removed:
        (hooks / name).unlink()
        if _exists(hooks / f"{name}{BACKUP_SUFFIX}"):
            (hooks / f"{name}{BACKUP_SUFFIX}").rename(hooks / name)
    (hooks / LOG_NAME).unlink(missing_ok=True)
    typer.echo(f"Removed: {', '.join(removed)}." if removed else "There are no hooks of Forgearr here.")


def _hooks_folder(folder: Path) -> Path:
    """Return the folder in which git finds the hooks of this repository."""
    variables = {name: value for name, value in os.environ.items() if name not in {"GIT_DIR", "GIT_WORK_TREE"}}
    command = ["git", "rev-parse", "--git-common-dir", "--git-path", "hooks"]
    try:
        result = subprocess.run(
            command, cwd=folder.expanduser(), env=variables, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise InvalidRequest(f"{folder} cannot be read: {error}") from None
    if result.returncode:
        raise InvalidRequest(f"{folder} is not a git repository.")
    git_folder, hooks = [(folder.expanduser() / line).resolve() for line in result.stdout.splitlines()]
    work_tree = git_folder.parent if git_folder.name == ".git" else git_folder
    if not hooks.is_relative_to(work_tree):
        raise InvalidRequest(f"The hooks of {folder} are in {hooks}, which other repositories share (core.hooksPath).")
    return hooks


def _script(repository: str, key_file: Path | None, hooks: Path) -> str:
    """Return the script of a hook. It sets all variables itself, because git runs it in another environment."""
    from cluster.settings import home

    variables = {"FORGEARR_HOME": str(home())}
    variables |= {name: os.environ[name] for name in ("FORGEARR_URL", "PYTHONPATH") if name in os.environ}
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    if key_file is not None:
        path = shlex.quote(str(key_file.expanduser().resolve()))
        exports.append(f'FORGEARR_API_KEY="$(cat {path})" && export FORGEARR_API_KEY')
    command = shlex.join([sys.executable, "-m", "cluster.cli", "repo", "check", repository])
    return "\n".join(
        [
            "#!/bin/sh",
            MARKER,
            f'before="$0{BACKUP_SUFFIX}"',
            "status=0",
            'if [ -x "$before" ]; then "$before" "$@"; status=$?; fi',
            "(",
            "unset $(git rev-parse --local-env-vars)",
            "trap '' HUP",
            "cd /",
            *exports,
            f"exec {command}",
            f") </dev/null >{shlex.quote(str(hooks / LOG_NAME))} 2>&1 &",
            'exit "$status"',
            "",
        ]
    )


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _is_ours(hook: Path) -> bool:
    try:
        return MARKER in hook.read_text()
    except (FileNotFoundError, UnicodeDecodeError):
        return False
