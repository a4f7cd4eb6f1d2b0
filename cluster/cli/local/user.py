"""`forgearr user`: manage accounts. It uses the database directly, so no server has to run."""

import asyncio
import sys
from typing import Annotated

import typer

app = typer.Typer(name="user", help="Manage accounts.", no_args_is_help=True)

Email = Annotated[str, typer.Argument(help="The account's email address.", show_default=False)]
PasswordStdin = Annotated[bool, typer.Option("--password-stdin", help="Read the password from standard input.")]


@app.command()
def add(
    email: Email,
    username: Annotated[str | None, typer.Option(help="Default: the email up to the @.", show_default=False)] = None,
    full_name: Annotated[str | None, typer.Option(help="Display name.", show_default=False)] = None,
    admin: Annotated[bool, typer.Option("--admin", help="Make it an administrator.")] = False,
    password_stdin: PasswordStdin = False,
) -> None:
    """Create an account."""
    from sqlalchemy.ext.asyncio import AsyncSession

    from cluster import audit_log, identity
    from cluster.migrations import run_in_own_session
    from cluster.ownership import LOCAL

    name = username or email.partition("@")[0]

    async def work(session: AsyncSession) -> None:
        user = await identity.add_user(
            session,
            email=email,
            username=name,
            full_name=full_name,
            password_hash=password_hash,
            role="admin" if admin else "user",
        )
        audit_log.record(session, "account.create", LOCAL, user.email, role=user.role)

    password_hash = asyncio.run(identity.hash_password(_read_password(password_stdin), name, email))
    asyncio.run(run_in_own_session(work))
    typer.echo(f"Created the {'administrator' if admin else 'account'} {email}.")


@app.command("list")
def list_() -> None:
    """List all accounts."""
    from cluster import identity
    from cluster.cli.console import console, table
    from cluster.migrations import run_in_own_session

    rows = table("email", "username", "role", "state", "created", "last login")
    for user in asyncio.run(run_in_own_session(identity.list_users)):
        last_login = f"{user.last_login_at:%Y-%m-%d %H:%M}" if user.last_login_at else "never"
        state = "active" if user.is_active else "disabled"
        rows.add_row(user.email, user.username, user.role, state, f"{user.created_at:%Y-%m-%d %H:%M}", last_login)
    console().print(rows)


@app.command()
def disable(email: Email) -> None:
    """Disable an account, at once."""
    _set_active(email, False)
    typer.echo(f"Disabled {email}.")


@app.command()
def enable(email: Email) -> None:
    """Enable a disabled account. Its API keys from before are revoked."""
    _set_active(email, True)
    typer.echo(f"Enabled {email}.")


@app.command()
def logout(email: Email) -> None:
    """End all logins of an account, and revoke its API keys."""
    from sqlalchemy.ext.asyncio import AsyncSession

    from cluster import audit_log, identity
    from cluster.migrations import run_in_own_session
    from cluster.ownership import LOCAL

    async def work(session: AsyncSession) -> None:
        user = await identity.get_user(session, email)
        await identity.end_all_credentials(session, user)
        audit_log.record(session, "logout", LOCAL, user.email, everywhere=True)

    asyncio.run(run_in_own_session(work))
    typer.echo(f"Ended all logins of {email} and revoked its API keys.")


@app.command()
def password(email: Email, password_stdin: PasswordStdin = False) -> None:
    """Set a new password, end all logins of the account, and revoke its API keys."""
    from sqlalchemy.ext.asyncio import AsyncSession

    from cluster import audit_log, identity
    from cluster.migrations import run_in_own_session
    from cluster.ownership import LOCAL

    async def work(session: AsyncSession) -> None:
        user = await identity.get_user(session, email)
        await identity.set_password(session, user, password_hash)
        audit_log.record(session, "password.change", LOCAL, user.email)

    password_hash = asyncio.run(identity.hash_password(_read_password(password_stdin), email))
    asyncio.run(run_in_own_session(work))
    typer.echo(f"Changed the password of {email}.")


def _set_active(email: str, active: bool) -> None:
    from sqlalchemy.ext.asyncio import AsyncSession

    from cluster import audit_log, identity
    from cluster.migrations import run_in_own_session
    from cluster.ownership import LOCAL

    async def work(session: AsyncSession) -> None:
        user = await identity.get_user(session, email)
        await identity.set_active(session, user, active)
        audit_log.record(session, "account.enable" if active else "account.disable", LOCAL, user.email)

    asyncio.run(run_in_own_session(work))


def _read_password(from_stdin: bool) -> str:
    if from_stdin:
        return sys.stdin.readline().rstrip("\r\n")
    return typer.prompt("Password", hide_input=True, confirmation_prompt=True)
