"""`forgearr key`: create, list and revoke API keys. It uses the database directly, so no server has to run."""

import asyncio
from typing import Annotated

import typer

app = typer.Typer(name="key", help="Manage the API keys of accounts.", no_args_is_help=True)


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What the key is for.", show_default=False)],
    user: Annotated[str, typer.Option(help="Email of the account that it belongs to.", show_default=False)],
    days: Annotated[
        int | None, typer.Option(min=1, max=3650, help="Days until it expires. Default: never.", show_default=False)
    ] = None,
) -> None:
    """Create a key. It is printed once, alone on standard output, and cannot be shown again."""
    from datetime import timedelta

    from sqlalchemy.ext.asyncio import AsyncSession

    from cluster import audit_log, identity
    from cluster.db import now
    from cluster.migrations import run_in_own_session
    from cluster.ownership import LOCAL

    async def work(session: AsyncSession) -> str:
        owner = await identity.get_user(session, user)
        expires_at = now() + timedelta(days=days) if days else None
        row, key = await identity.create_key(session, owner.id, name, expires_at)
        expiry = expires_at and expires_at.isoformat()
        audit_log.record(session, "key.create", LOCAL, row.id, name=name, expires_at=expiry, user=owner.email)
        return key

    key = asyncio.run(run_in_own_session(work))
    typer.echo("Store this key now; it is not shown again.", err=True)
    typer.echo(key)


@app.command("list")
def list_() -> None:
    """List the keys of all accounts."""
    from cluster import identity
    from cluster.cli.console import console, table
    from cluster.migrations import run_in_own_session

    rows = table("id", "name", "key", "user", "created", "last used", "expires")
    for key, owner in asyncio.run(run_in_own_session(identity.list_keys)):
        last_used = f"{key.last_used_at:%Y-%m-%d %H:%M}" if key.last_used_at else "never"
        expires = f"{key.expires_at:%Y-%m-%d}" if key.expires_at else "never"
        created = f"{key.created_at:%Y-%m-%d}"
        rows.add_row(key.id, key.name, f"{key.prefix}…", owner.email, created, last_used, expires)
    console().print(rows)


@app.command()
def revoke(key_id: Annotated[str, typer.Argument(help="Its id in `forgearr key list`.", show_default=False)]) -> None:
    """Revoke a key, at once."""
    from sqlalchemy.ext.asyncio import AsyncSession

    from cluster import audit_log, identity
    from cluster.migrations import run_in_own_session
    from cluster.ownership import LOCAL

    async def work(session: AsyncSession) -> None:
        await identity.revoke_key(session, key_id)
        audit_log.record(session, "key.revoke", LOCAL, key_id)

    asyncio.run(run_in_own_session(work))
    typer.echo("Revoked.")
