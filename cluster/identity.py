"""Who may use this installation: accounts, and the three credentials that stand for one.

An access token (a JWT) is short-lived and proves itself; the account is still read on every use, so that disabling it
takes effect at once. A refresh token is good for one use and hands out its successor; all successors of one login are a
family. An API key lasts until it expires or is revoked. Of the last two only a hash is kept.
"""

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from functools import cache
from typing import Literal
from uuid import uuid4

import jwt
from email_validator import EmailNotValidError, validate_email
from pwdlib import PasswordHash
from sqlalchemy import ForeignKey, String, delete, exists, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from cluster.db import Base, now
from cluster.errors import AccountDisabled, Conflict, NotFound, Unauthenticated, UnprocessableRequest
from cluster.secrets import new_token, signing_key, token_hash
from cluster.settings import get_settings

Role = Literal["user", "admin"]

KEY_PREFIX = "fgr"
SHOWN_KEY_CHARACTERS = len(KEY_PREFIX) + 1 + 8
USERNAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,49}$"
PASSWORD_MIN, PASSWORD_MAX = 8, 256
USE_RECORDED_EVERY = timedelta(minutes=1)

# One argon2 takes 64 MB and a core; two at a time keep a burst of logins from taking the machine.
_hashing = ThreadPoolExecutor(max_workers=2, thread_name_prefix="password")


class AccountExists(Conflict):
    """There is an account with this email or username already."""

    code = "ACCOUNT_EXISTS"


class AccountNotFound(NotFound):
    """There is no account with this email."""

    code = "ACCOUNT_NOT_FOUND"


class KeyNotFound(NotFound):
    """There is no such API key."""

    code = "API_KEY_NOT_FOUND"


class User(Base):
    __tablename__ = "users"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=lambda: str(uuid4()))
    email: Mapped[str] = mapped_column(String(320), unique=True)  # in lower case
    username: Mapped[str] = mapped_column(String(50), unique=True)
    full_name: Mapped[str | None] = mapped_column(String(200))
    password_hash: Mapped[str] = mapped_column(String(200))
    role: Mapped[Role] = mapped_column(String(10), default="user")
    is_active: Mapped[bool] = mapped_column(default=True)
    created_at: Mapped[datetime] = mapped_column(default=now)
    last_login_at: Mapped[datetime | None]


class RefreshToken(Base):
    __tablename__ = "refresh_tokens"

    hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    family: Mapped[str] = mapped_column(String(36), index=True)  # all that descend from one login
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    expires_at: Mapped[datetime]
    used_at: Mapped[datetime | None]


class ApiKey(Base):
    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=lambda: str(uuid4()))
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    name: Mapped[str] = mapped_column(String(100))
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    prefix: Mapped[str] = mapped_column(String(20))  # its first characters, by which its owner knows it
    created_at: Mapped[datetime] = mapped_column(default=now)
    expires_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]  # to the minute


# Accounts


async def add_user(
    session: AsyncSession,
    *,
    email: str,
    username: str,
    password_hash: str,
    full_name: str | None = None,
    role: Role = "user",
) -> User:
    if not re.fullmatch(USERNAME, username):
        raise UnprocessableRequest(
            f"'{username}' cannot be a username: it takes up to 50 letters, digits, dots, dashes and underscores."
        )
    user = User(
        email=normal_email(email), username=username, password_hash=password_hash, full_name=full_name, role=role
    )
    session.add(user)
    try:
        await session.flush()
    except IntegrityError as error:
        raise AccountExists() from error
    return user


async def find_user(session: AsyncSession, email: str) -> User | None:
    return await session.scalar(select(User).where(User.email == email.strip().lower()))


async def active_user(session: AsyncSession, user_id: str) -> User:
    return _active(await session.get(User, user_id))


async def get_user(session: AsyncSession, email: str) -> User:
    user = await find_user(session, email)
    if user is None:
        raise AccountNotFound(f"There is no account with the email {email}.")
    return user


async def list_users(session: AsyncSession) -> list[User]:
    return list(await session.scalars(select(User).order_by(User.created_at, User.id)))


async def has_admin(session: AsyncSession) -> bool:
    """Whether anybody could administer this installation over the network."""
    return bool(await session.scalar(select(exists().where(User.role == "admin", User.is_active))))


async def set_active(session: AsyncSession, user: User, active: bool) -> None:
    user.is_active = active
    if not active:
        await _end_all_logins(session, user)


async def set_password(session: AsyncSession, user: User, password_hash: str) -> None:
    """A new password ends every login that the old one opened."""
    user.password_hash = password_hash
    await _end_all_logins(session, user)


def normal_email(email: str) -> str:
    """An email address in the one spelling that is stored."""
    try:
        return validate_email(email.strip(), check_deliverability=False).normalized.lower()
    except EmailNotValidError as error:
        raise UnprocessableRequest(f"'{email}' is not an email address: {error}") from error


# Passwords


async def hash_password(password: str) -> str:
    if not PASSWORD_MIN <= len(password) <= PASSWORD_MAX:
        raise UnprocessableRequest(f"A password has {PASSWORD_MIN} to {PASSWORD_MAX} characters.")
    return await asyncio.get_running_loop().run_in_executor(_hashing, _hasher().hash, password)


async def is_password_of(user: User | None, password: str) -> bool:
    """Whether this is the user's password. Takes as long for nobody, so that it does not tell who has an account."""
    loop = asyncio.get_running_loop()
    if user is None:
        await loop.run_in_executor(_hashing, _hasher().hash, password)
        return False
    return await loop.run_in_executor(_hashing, _hasher().verify, password, user.password_hash)


@cache
def _hasher() -> PasswordHash:
    return PasswordHash.recommended()


# Access tokens


def access_token(user: User) -> str:
    issued = now()
    claims = {
        "sub": user.id,
        "role": user.role,
        "iat": issued,
        "exp": issued + timedelta(minutes=get_settings().auth.access_token_minutes),
        "jti": str(uuid4()),
        "type": "access",
    }
    return jwt.encode(claims, signing_key(), algorithm="HS256")


async def user_of_access_token(session: AsyncSession, token: str) -> User:
    try:
        claims = jwt.decode(
            token, signing_key(), algorithms=["HS256"], options={"require": ["sub", "iat", "exp", "jti", "type"]}
        )
    except jwt.ExpiredSignatureError as error:
        raise Unauthenticated("The access token has expired; refresh it or log in again.") from error
    except jwt.InvalidTokenError as error:
        raise Unauthenticated() from error
    if claims["type"] != "access":
        raise Unauthenticated()
    return await active_user(session, claims["sub"])


# Refresh tokens


async def start_login(session: AsyncSession, user: User) -> str:
    """Record a login and open a family of refresh tokens; returns the first."""
    await session.execute(delete(RefreshToken).where(RefreshToken.user_id == user.id, RefreshToken.expires_at < now()))
    await session.execute(update(User).where(User.id == user.id).values(last_login_at=now()))
    return _new_refresh_token(session, user.id, family=str(uuid4()))


async def rotate_refresh_token(session: AsyncSession, token: str) -> tuple[User, str] | None:
    """Exchange a refresh token for its successor; None if it is not good.

    A token that comes back was stolen, or its successor was: nobody can tell which, so the whole family ends. That is
    a write, which is why the refusal is returned and not raised: the transaction must be committed.
    """
    user, row = await _locked_refresh_token(session, token)
    if user is None or row is None or row.expires_at <= now():
        return None
    if row.used_at is not None:
        await _end_family(session, row)
        return None
    row.used_at = now()
    return user, _new_refresh_token(session, user.id, row.family)


async def end_login(session: AsyncSession, token: str) -> None:
    """Revoke the family of a refresh token. One that is unknown is as good as revoked."""
    _, row = await _locked_refresh_token(session, token)
    if row is not None:
        await _end_family(session, row)


async def _locked_refresh_token(session: AsyncSession, token: str) -> tuple[User, RefreshToken] | tuple[None, None]:
    """The token and its user, whose row is the lock: or else a family could grow while it is being ended."""
    owner = select(RefreshToken.user_id).where(RefreshToken.hash == token_hash(token)).scalar_subquery()
    user = await session.scalar(select(User).where(User.id == owner).with_for_update())
    row = await session.get(RefreshToken, token_hash(token), populate_existing=True) if user else None
    return (user, row) if user and row else (None, None)


async def _end_family(session: AsyncSession, row: RefreshToken) -> None:
    await session.execute(delete(RefreshToken).where(RefreshToken.family == row.family))


async def _end_all_logins(session: AsyncSession, user: User) -> None:
    await session.execute(delete(RefreshToken).where(RefreshToken.user_id == user.id))


def _new_refresh_token(session: AsyncSession, user_id: str, family: str) -> str:
    token = new_token("refresh")
    expires_at = now() + timedelta(days=get_settings().auth.refresh_token_days)
    session.add(RefreshToken(hash=token_hash(token), family=family, user_id=user_id, expires_at=expires_at))
    return token


# API keys


async def create_key(
    session: AsyncSession, user_id: str, name: str, expires_at: datetime | None = None
) -> tuple[ApiKey, str]:
    """A new key: its record, and the key itself, which cannot be shown again."""
    token = new_token(KEY_PREFIX)
    key = ApiKey(
        user_id=user_id,
        name=name,
        hash=token_hash(token),
        prefix=token[:SHOWN_KEY_CHARACTERS],
        expires_at=expires_at,
    )
    session.add(key)
    await session.flush()
    return key, token


async def list_keys(session: AsyncSession, user_id: str | None = None) -> list[tuple[ApiKey, User]]:
    """The keys of one user, or of everybody."""
    query = select(ApiKey, User).join(User).order_by(ApiKey.created_at, ApiKey.id)
    if user_id is not None:
        query = query.where(ApiKey.user_id == user_id)
    return [(key, user) for key, user in await session.execute(query)]


async def revoke_key(session: AsyncSession, key_id: str, user_id: str | None = None) -> None:
    """Revoke a key, if `user_id` is given only one of theirs."""
    key = await session.get(ApiKey, key_id, with_for_update=True)
    if key is None or user_id not in (None, key.user_id):
        raise KeyNotFound()
    await session.delete(key)


async def user_of_key(session: AsyncSession, token: str) -> tuple[User, ApiKey]:
    query = select(User, ApiKey).join(ApiKey).where(ApiKey.hash == token_hash(token))
    found = (await session.execute(query)).one_or_none()
    if found is None:
        raise Unauthenticated()
    user, key = found
    if key.expires_at is not None and key.expires_at <= now():
        raise Unauthenticated("This API key has expired.")
    return _active(user), key


def is_use_due(key: ApiKey) -> bool:
    """Whether it is time again to record that the key is in use."""
    return key.last_used_at is None or key.last_used_at <= now() - USE_RECORDED_EVERY


async def record_use(session: AsyncSession, key: ApiKey) -> None:
    unrecorded = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at <= now() - USE_RECORDED_EVERY)
    await session.execute(update(ApiKey).where(ApiKey.id == key.id, unrecorded).values(last_used_at=now()))


def _active(user: User | None) -> User:
    if user is None:
        raise Unauthenticated()
    if not user.is_active:
        raise AccountDisabled()
    return user
