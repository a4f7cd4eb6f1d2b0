"""`forgearr backup` and `forgearr restore`: an installation as one file. Both work without a server."""

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cluster.backup import BackupResult, RestoreResult

PassphraseFile = Annotated[
    Path | None,
    typer.Option("--passphrase-file", help="A file whose first line is the passphrase.", show_default=False),
]


def backup(
    path: Annotated[Path, typer.Argument(help="The file to make, or a folder for it.", show_default=False)],
    passphrase_file: PassphraseFile = None,
    without_secrets: Annotated[
        bool, typer.Option("--without-secrets", help="Leave out keys/ and forgearr.yaml, and do not encrypt.")
    ] = False,
) -> None:
    """Make a backup: database, files, MLflow, keys and settings. Forgearr may run meanwhile."""
    from cluster import backup as cluster_backup
    from cluster.cli.console import StepPrinter

    if without_secrets and passphrase_file:
        raise typer.BadParameter("--passphrase-file has no effect with --without-secrets.")
    passphrase = None if without_secrets else _read_passphrase(passphrase_file, is_new=True)
    result = asyncio.run(cluster_backup.create(path.absolute(), passphrase, StepPrinter()))
    asyncio.run(_record(result))
    _print_missing(result)


def restore(
    path: Annotated[Path, typer.Argument(help="The backup.", show_default=False)],
    passphrase_file: PassphraseFile = None,
) -> None:
    """Restore a backup into an empty FORGEARR_HOME. It is verified as a whole first."""
    from cluster import backup as cluster_backup
    from cluster.cli.console import StepPrinter

    result = asyncio.run(
        cluster_backup.restore(path.absolute(), lambda: _read_passphrase(passphrase_file, is_new=False), StepPrinter())
    )
    _print_next_steps(result)


def _read_passphrase(file: Path | None, *, is_new: bool) -> str:
    """From the file, the settings, or the terminal. It is no argument, because others can read command lines."""
    from cluster.errors import InvalidRequest
    from cluster.settings import MIN_PASSPHRASE_LENGTH, get_settings

    configured = get_settings().backup.passphrase
    if file is not None:
        if not file.is_file():
            raise InvalidRequest(f"There is no file {file}.")
        passphrase = file.read_text().partition("\n")[0].rstrip("\r")
    elif configured is not None:
        passphrase = configured.get_secret_value()
    elif sys.stdin.isatty():
        passphrase = typer.prompt("Passphrase", hide_input=True, confirmation_prompt=is_new)
    else:
        raise InvalidRequest(
            "A passphrase is needed, and there is no terminal to ask on: give --passphrase-file, or set "
            "backup.passphrase in forgearr.yaml or FORGEARR_BACKUP__PASSPHRASE in the environment."
            + (" --without-secrets makes a backup that needs none." if is_new else "")
        )
    if is_new and len(passphrase) < MIN_PASSPHRASE_LENGTH:
        raise InvalidRequest(f"The passphrase has to have at least {MIN_PASSPHRASE_LENGTH} characters.")
    return passphrase


async def _record(result: "BackupResult") -> None:
    from cluster import audit_log, migrations
    from cluster.db import get_database
    from cluster.ownership import LOCAL

    if not migrations.is_newest(result.header.revision):
        return  # nothing migrates it but `up`, and its audit log may have another schema
    await audit_log.record_alone(
        "backup.create", LOCAL, str(result.path), bytes=result.bytes, encrypted=result.header.is_encrypted
    )
    await get_database().close()


def _print_missing(result: "BackupResult") -> None:
    from cluster.settings import get_settings, mask_url

    if result.header.mlflow == "elsewhere":
        uri = mask_url(get_settings().mlflow_uri or "")
        typer.echo(f"Not in it: MLflow at {uri}, with the runs and the model versions. Back it up there too.")
    if not result.header.has_secrets:
        typer.echo("Not in it: keys/ and forgearr.yaml. What people and models wrote is in it, for anybody to read.")
    else:
        typer.echo("Nobody can restore it without the passphrase: keep that in another place.")


def _print_next_steps(result: "RestoreResult") -> None:
    if result.kept_settings:
        typer.echo("The forgearr.yaml that was there stays; that of the backup was not used.")
    if not result.header.has_secrets:
        typer.echo(
            "The backup has no keys, so `forgearr up` makes new ones: everybody must log in again, and "
            "`forgearr keys check` lists the secrets that must be entered again."
        )
        if not result.kept_settings:
            typer.echo("The backup has no forgearr.yaml: write the settings that differ from the defaults anew.")
    if result.header.mlflow == "elsewhere":
        typer.echo("The backup has no MLflow: its runs and model versions are where mlflow.tracking_uri names them.")
    if result.was_elsewhere is not None:
        typer.echo(f"It was made in {result.was_elsewhere}. Addresses of files are changed to the new folder.")
    typer.echo(
        "Restored. `forgearr up` starts it, and goes on with the jobs that were running. Do not run it while the "
        "installation that was backed up runs too: both would do the same work."
    )
