"""Changes to an account: its activation and its password."""

from sqlalchemy.ext.asyncio import AsyncSession

from cluster.identity.logins import end_all_logins
from cluster.identity.users import User


async def set_active(session: AsyncSession, user: User, active: bool) -> None:
    user.is_active = active
    if not active:
        await end_all_logins(session, user)


async def set_password(session: AsyncSession, user: User, password_hash: str) -> None:
    """A new password ends every login that the old one opened."""
    user.password_hash = password_hash
    await end_all_logins(session, user)
