"""Logins: access tokens, and rotating refresh tokens."""

from datetime import datetime, timedelta
from uuid import uuid4

import jwt
from sqlalchemy import ForeignKey, String, delete, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from cluster import audit_log
from cluster.db import Base, delete_rows, now
from cluster.errors import Unauthenticated
from cluster.identity.users import User, get_active_user, lock_unchanged, principal
from cluster.secrets import new_token, signing_key, token_hash
from cluster.settings import get_settings


class RefreshToken(Base):
    __tablename__ = "refresh_tokens"

    hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    family: Mapped[str] = mapped_column(String(36), index=True)  # the same for all successors of one login
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    expires_at: Mapped[datetime]
    used_at: Mapped[datetime | None]


def create_access_token(user: User) -> str:
    issued_at = now()
    claims = {
        "sub": user.id,
        "ver": user.token_version,
        "role": user.role,
        "iat": issued_at,
        "exp": issued_at + timedelta(minutes=get_settings().auth.access_token_minutes),
        "jti": str(uuid4()),
        "type": "access",
    }
    return jwt.encode(claims, signing_key(), algorithm="HS256")


async def user_from_access_token(session: AsyncSession, token: str) -> User:
    """The user of an access token that is valid now."""
    try:
        claims = jwt.decode(
            token, signing_key(), algorithms=["HS256"], options={"require": ["sub", "ver", "iat", "exp", "jti", "type"]}
        )
    except jwt.ExpiredSignatureError as error:
        raise Unauthenticated("The access token has expired; refresh it or log in again.") from error
    except jwt.InvalidTokenError as error:
        raise Unauthenticated() from error
    if claims["type"] != "access":
        raise Unauthenticated()
    user = await get_active_user(session, claims["sub"])
    if claims["ver"] != user.token_version:
        raise Unauthenticated("The login of this access token has ended. Log in again.")
    return user


async def start_login(session: AsyncSession, user: User) -> str:
    """Record a login, and return the first refresh token of a new family."""
    (await lock_unchanged(session, user)).last_login_at = now()
    await session.execute(delete(RefreshToken).where(RefreshToken.user_id == user.id, RefreshToken.expires_at < now()))
    return _new_refresh_token(session, user.id, family=str(uuid4()))


async def rotate_refresh_token(session: AsyncSession, token: str) -> tuple[User, str] | None:
    """Exchange a refresh token for its successor. None if it is not valid.

    If a token is used twice, it or its successor was stolen. It is unknown which, so the whole family is deleted. The
    refusal is returned and not raised, because the transaction with this deletion must be committed.
    """
    user, row = await _lock_refresh_token(session, token)
    if user is None or row is None or row.expires_at <= now():
        return None
    if row.used_at is not None:
        await _end_family(session, row)
        audit_log.record(session, "refresh", principal(user), outcome="refused", reason="The token was used twice.")
        return None
    row.used_at = now()
    return user, _new_refresh_token(session, user.id, row.family)


async def user_from_refresh_token(session: AsyncSession, token: str) -> User | None:
    """The user of a refresh token, whose row is locked. None if the token is not valid."""
    user, row = await _lock_refresh_token(session, token)
    if user is None or row is None or row.used_at is not None or row.expires_at <= now():
        return None
    return user


async def end_login(session: AsyncSession, token: str) -> User | None:
    """Delete the family of a refresh token, and return its user. An unknown token is no error."""
    user, row = await _lock_refresh_token(session, token)
    if row is not None:
        await _end_family(session, row)
    return user


async def _lock_refresh_token(session: AsyncSession, token: str) -> tuple[User, RefreshToken] | tuple[None, None]:
    """Return the token and its user. The user's row is locked, so that a family cannot grow while it is deleted."""
    user_id = select(RefreshToken.user_id).where(RefreshToken.hash == token_hash(token)).scalar_subquery()
    user = await session.scalar(select(User).where(User.id == user_id).with_for_update())
    row = await session.get(RefreshToken, token_hash(token), populate_existing=True) if user else None
    return (user, row) if user and row else (None, None)


async def _end_family(session: AsyncSession, row: RefreshToken) -> None:
    await session.execute(delete(RefreshToken).where(RefreshToken.family == row.family))


async def delete_expired_logins(session: AsyncSession) -> int:
    """Delete the refresh tokens that have expired, also of people who never log in again. Returns their number."""
    return await delete_rows(session, delete(RefreshToken).where(RefreshToken.expires_at <= now()))


async def delete_all_logins(session: AsyncSession) -> None:
    """Delete the refresh tokens of all accounts. Access tokens end with the key that has signed them."""
    await session.execute(delete(RefreshToken))


async def end_all_logins(session: AsyncSession, user: User) -> None:
    """Make all refresh tokens and access tokens of an account invalid."""
    await session.refresh(user, ["token_version"], with_for_update=True)
    user.token_version += 1
    await session.execute(delete(RefreshToken).where(RefreshToken.user_id == user.id))


def _new_refresh_token(session: AsyncSession, user_id: str, family: str) -> str:
    token = new_token("refresh")
    expires_at = now() + timedelta(days=get_settings().auth.refresh_token_days)
    session.add(RefreshToken(hash=token_hash(token), family=family, user_id=user_id, expires_at=expires_at))
    return token
