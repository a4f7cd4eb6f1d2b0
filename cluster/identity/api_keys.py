"""API keys: creation, revocation, and the user behind a key."""

from datetime import datetime, timedelta
from uuid import uuid4

from sqlalchemy import ForeignKey, String, delete, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from cluster.db import Base, now
from cluster.errors import Conflict, Forbidden, NotFound, Unauthenticated
from cluster.identity.users import User, require_active
from cluster.secrets import new_token, token_hash
from cluster.settings import get_settings

KEY_PREFIX = "fgr"
DISPLAYED_KEY_LENGTH = len(KEY_PREFIX) + 1 + 8
USE_RECORD_INTERVAL = timedelta(minutes=1)


class KeyNotFound(NotFound):
    """There is no such API key."""

    code = "API_KEY_NOT_FOUND"


class TooManyKeys(Conflict):
    """The account has as many API keys as one may have: revoke one first."""

    code = "TOO_MANY_API_KEYS"


class KeyLivesLonger(Forbidden):
    """An API key may make no key that lives longer than itself."""

    code = "API_KEY_LIVES_LONGER"


class ApiKey(Base):
    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=lambda: str(uuid4()))
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    name: Mapped[str] = mapped_column(String(100))
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    prefix: Mapped[str] = mapped_column(String(20))  # its first characters, by which its owner recognises it
    created_at: Mapped[datetime] = mapped_column(default=now)
    expires_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]  # updated at most once per USE_RECORD_INTERVAL


async def create_key(
    session: AsyncSession,
    user_id: str,
    name: str,
    expires_at: datetime | None = None,
    *,
    made_with: ApiKey | None = None,
) -> tuple[ApiKey, str]:
    """Create a key, perhaps with another key. Returns its row and the key itself, which is not stored."""
    latest = made_with.expires_at if made_with else None
    if latest is not None and (expires_at is None or expires_at > latest):
        raise KeyLivesLonger(
            f"This request's API key expires at {latest:%Y-%m-%dT%H:%M:%SZ}, and a key that it makes may not live "
            "longer. Send an earlier expires_at, or log in with a password."
        )
    # The lock makes concurrent requests count one after the other.
    await session.execute(select(User.id).where(User.id == user_id).with_for_update())
    await session.execute(delete(ApiKey).where(ApiKey.user_id == user_id, ApiKey.expires_at <= now()))
    count = await session.scalar(select(func.count()).where(ApiKey.user_id == user_id)) or 0
    if count >= get_settings().auth.max_api_keys:
        raise TooManyKeys(f"The account has {count} API keys, as many as auth.max_api_keys permits: revoke one first.")
    token = new_token(KEY_PREFIX)
    key = ApiKey(
        user_id=user_id,
        name=name,
        hash=token_hash(token),
        prefix=token[:DISPLAYED_KEY_LENGTH],
        expires_at=expires_at,
    )
    session.add(key)
    await session.flush()
    return key, token


async def list_keys(session: AsyncSession, user_id: str | None = None) -> list[tuple[ApiKey, User]]:
    """List the keys of one user, or of all users."""
    query = select(ApiKey, User).join(User).order_by(ApiKey.created_at, ApiKey.id)
    if user_id is not None:
        query = query.where(ApiKey.user_id == user_id)
    return [(key, user) for key, user in await session.execute(query)]


async def revoke_key(session: AsyncSession, key_id: str, user_id: str | None = None) -> None:
    """Revoke a key. With `user_id`, only a key of that user."""
    key = await session.get(ApiKey, key_id, with_for_update=True)
    if key is None or user_id not in (None, key.user_id):
        raise KeyNotFound()
    await session.delete(key)


async def revoke_keys(session: AsyncSession, user: User) -> None:
    """Revoke all keys of a user."""
    await session.execute(delete(ApiKey).where(ApiKey.user_id == user.id))


async def user_from_key(session: AsyncSession, token: str) -> tuple[User, ApiKey]:
    query = select(User, ApiKey).join(ApiKey).where(ApiKey.hash == token_hash(token))
    row = (await session.execute(query)).one_or_none()
    if row is None:
        raise Unauthenticated()
    user, key = row
    if key.expires_at is not None and key.expires_at <= now():
        raise Unauthenticated("This API key has expired.")
    return require_active(user), key


def should_record_use(key: ApiKey) -> bool:
    """Whether the last recorded use is long enough ago to record a new one."""
    return key.last_used_at is None or key.last_used_at <= now() - USE_RECORD_INTERVAL


async def record_use(session: AsyncSession, key: ApiKey) -> None:
    is_due = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at <= now() - USE_RECORD_INTERVAL)
    await session.execute(update(ApiKey).where(ApiKey.id == key.id, is_due).values(last_used_at=now()))
