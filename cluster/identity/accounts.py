"""Changes to an account that also end its logins: a new password, deactivation."""

from sqlalchemy.ext.asyncio import AsyncSession

from cluster.identity.logins import end_all_logins
from cluster.identity.users import User


async def set_active(session: AsyncSession, user: User, active: bool) -> None:
    """Enable or disable an account. Disabling ends all its logins."""
    user.is_active = active
    if not active:
        await end_all_logins(session, user)


async def set_password(session: AsyncSession, user: User, password_hash: str) -> None:
    """Set a new password, and end all logins of the account."""
    user.password_hash = password_hash
    await end_all_logins(session, user)
