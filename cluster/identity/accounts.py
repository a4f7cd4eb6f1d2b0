"""Changes to an account that also end its credentials: a new password, deactivation, a logout everywhere."""

from sqlalchemy.ext.asyncio import AsyncSession

from cluster.identity.api_keys import revoke_keys
from cluster.identity.logins import end_all_logins
from cluster.identity.users import User


async def set_active(session: AsyncSession, user: User, active: bool) -> None:
    """Enable or disable an account. No credential from before works again.

    While the account is disabled its API keys stay, and are refused with that reason. Enabling it revokes them.
    """
    if active == user.is_active:
        return
    user.is_active = active
    await end_all_logins(session, user)
    if active:
        await revoke_keys(session, user)


async def set_password(session: AsyncSession, user: User, password_hash: str) -> None:
    """Set a new password, and end all credentials: whoever knew the old one may have made some."""
    user.password_hash = password_hash
    await end_all_credentials(session, user)


async def end_all_credentials(session: AsyncSession, user: User) -> None:
    """End all logins of an account, and revoke its API keys."""
    await end_all_logins(session, user)
    await revoke_keys(session, user)
