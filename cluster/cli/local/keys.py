"""`forgearr keys`: check and change the keys of this installation. It uses the database directly; no server runs."""

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cluster.sealing import SealedSecret

app = typer.Typer(
    name="keys", help="Check and change the keys of this installation: those that sign and seal.", no_args_is_help=True
)


@app.command()
def check() -> None:
    """List the stored secrets that the sealing key does not open, and how to enter them again."""
    from cluster import sealing, secrets
    from cluster.migrations import run_in_own_session

    unreadable = asyncio.run(run_in_own_session(sealing.find_unreadable))
    if secrets.has_old_sealing_key():
        typer.echo("An old sealing key is accepted too. `forgearr keys rotate` seals everything with the new one.")
    _show(unreadable)
    if unreadable:
        raise typer.Exit(1)
    typer.echo("All stored secrets can be opened.")


@app.command()
def rotate(
    signing: Annotated[
        bool, typer.Option("--signing", help="Replace the key that signs access tokens instead, and end all logins.")
    ] = False,
) -> None:
    """Replace the sealing key, and seal all stored secrets with the new one. Forgearr must not run."""
    from cluster.runtime import privacy, run_state
    from cluster.settings import get_settings

    privacy.require_private_home()
    with run_state.exclusive_lock():
        if signing:
            asyncio.run(_rotate_signing_key())
            typer.echo("There is a new signing key. Everybody must log in again; API keys stay valid.")
        else:
            count, unreadable = asyncio.run(_rotate_sealing_key())
            typer.echo(f"{count} stored secrets are sealed with the new key.")
            _show(unreadable)
    if get_settings().auth.old_sealing_key and not signing:
        typer.echo("Remove auth.old_sealing_key now, on every node.")
    elif get_settings().ray.address:
        typer.echo("Copy the folder keys/ to every node of the cluster before the next `forgearr up`.")


async def _rotate_sealing_key() -> "tuple[int, list[SealedSecret]]":
    from cluster import sealing
    from cluster.db import get_database
    from cluster.migrations import migrate

    try:
        await migrate()
        return await sealing.rotate_sealing_key(get_database())
    finally:
        await get_database().close()


async def _rotate_signing_key() -> None:
    from sqlalchemy.ext.asyncio import AsyncSession

    from cluster import audit_log, identity, secrets
    from cluster.migrations import run_in_own_session
    from cluster.ownership import LOCAL

    async def work(session: AsyncSession) -> None:
        secrets.new_signing_key()
        await identity.delete_all_logins(session)
        audit_log.record(session, "keys.rotate", LOCAL, "signing")

    await run_in_own_session(work)


def _show(unreadable: "list[SealedSecret]") -> None:
    from rich.markup import escape

    from cluster.cli.console import console, table

    if unreadable:
        rows = table("cannot be opened", "enter it again with")
        for secret in unreadable:
            rows.add_row(escape(secret.name), escape(secret.entered_by))
        console().print(rows)
