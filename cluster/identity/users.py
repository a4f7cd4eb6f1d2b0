"""Accounts of the people who may use this installation.

An account has three types of credential. An access token (a JWT) is short-lived; the account is read on every use, so
disabling it takes effect at once. A refresh token is valid for one use, which returns its successor; all successors of
one login are a family. An API key is valid until it expires or is revoked. Of the last two only a hash is stored.

An access token carries the account's `token_version`. What ends all logins of an account raises that number.
"""

import re
from datetime import datetime
from typing import Literal
from uuid import uuid4

from email_validator import EmailNotValidError, validate_email
from sqlalchemy import String, exists, or_, select
from sqlalchemy.engine.default import DefaultExecutionContext
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from cluster.db import Base, now
from cluster.errors import AccountDisabled, Conflict, Forbidden, NotFound, Unauthenticated, UnprocessableRequest
from cluster.ownership import LOCAL, Owned, Principal, Query, system

Role = Literal["user", "admin"]
USERNAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,49}$"
PLATFORM_NAMES = frozenset({"local", "system", "webhook", "guardian", "settings", "watch_downloads"})
"""In whose names the platform acts. Rows tell by a name who has created them, so no account may have one of these."""
ADMIN_NAMES = frozenset({"admin", "administrator", "root"})
"""Usernames that only administrators may have, because people trust them."""
MIN_PASSWORD_LENGTH, MAX_PASSWORD_LENGTH = 8, 256


class AccountExists(Conflict):
    """An account with this email or username exists already."""

    code = "ACCOUNT_EXISTS"


class AccountNotFound(NotFound):
    """There is no account with this email."""

    code = "ACCOUNT_NOT_FOUND"


class ReservedUsername(UnprocessableRequest):
    """Nobody, or only an administrator, may have this username."""

    code = "RESERVED_USERNAME"


def _lower_username(context: DefaultExecutionContext) -> str:
    """The username without regard to case: two accounts may not look alike."""
    return context.get_current_parameters()["username"].lower()


class User(Base):
    __tablename__ = "users"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=lambda: str(uuid4()))
    email: Mapped[str] = mapped_column(String(320), unique=True)  # in lower case
    username: Mapped[str] = mapped_column(String(50))
    username_key: Mapped[str] = mapped_column(String(50), unique=True, default=_lower_username)
    full_name: Mapped[str | None] = mapped_column(String(200))
    password_hash: Mapped[str] = mapped_column(String(200))
    role: Mapped[Role] = mapped_column(String(10), default="user")
    is_active: Mapped[bool] = mapped_column(default=True)
    token_version: Mapped[int] = mapped_column(default=0)  # access tokens with another one are no longer valid
    created_at: Mapped[datetime] = mapped_column(default=now)
    last_login_at: Mapped[datetime | None]


async def add_user(
    session: AsyncSession,
    *,
    email: str,
    username: str,
    password_hash: str,
    full_name: str | None = None,
    role: Role = "user",
) -> User:
    if not re.fullmatch(USERNAME_PATTERN, username):
        raise UnprocessableRequest(
            f"'{username}' is not a valid username: it has 1 to 50 letters, digits, dots, dashes and underscores, and "
            "begins with a letter or a digit."
        )
    if username.lower() in PLATFORM_NAMES or (username.lower() in ADMIN_NAMES and role != "admin"):
        raise ReservedUsername(f"The username '{username}' is reserved: choose another one.")
    user = User(
        email=normalize_email(email), username=username, password_hash=password_hash, full_name=full_name, role=role
    )
    session.add(user)
    try:
        await session.flush()
    except IntegrityError as error:
        raise AccountExists() from error
    return user


async def find_user(session: AsyncSession, email: str) -> User | None:
    return await session.scalar(select(User).where(User.email == canonical_email(email)))


async def get_active_user(session: AsyncSession, user_id: str) -> User:
    return require_active(await session.get(User, user_id))


async def lock_unchanged(session: AsyncSession, user: User) -> User:
    """Lock the row of an account whose password was verified before this transaction.

    Refused if its logins have ended since: to verify a password takes time, in which it may have been changed.
    """
    query = select(User).where(User.id == user.id, User.token_version == user.token_version)
    locked = await session.scalar(query.with_for_update().execution_options(populate_existing=True))
    if locked is None:
        raise Unauthenticated("The account was changed meanwhile. Log in again.")
    return locked


async def get_user(session: AsyncSession, email: str) -> User:
    user = await find_user(session, email)
    if user is None:
        raise AccountNotFound(f"There is no account with the email {email}.")
    return user


async def list_users(session: AsyncSession) -> list[User]:
    return list(await session.scalars(select(User).order_by(User.created_at, User.id)))


async def has_admin(session: AsyncSession) -> bool:
    """Whether there is an active administrator."""
    return bool(await session.scalar(select(exists().where(User.role == "admin", User.is_active))))


def normalize_email(email: str) -> str:
    """Validate an email address, and return it in the form that is stored."""
    try:
        return validate_email(email.strip(), check_deliverability=False).normalized.lower()
    except EmailNotValidError as error:
        raise UnprocessableRequest(f"'{email}' is not an email address: {error}") from error


def canonical_email(email: str) -> str:
    """The form in which this email is stored, if an account has it. What is no email address stays as it is."""
    try:
        return normalize_email(email)
    except UnprocessableRequest:
        return email


async def find_principal(session: AsyncSession, owner_id: str | None, name: str | None = None) -> Principal:
    """Return the principal of a stored row, with the rights that its owner has now.

    A row without an owner belongs to the platform.
    """
    if owner_id is None:
        return system(name) if name else LOCAL
    user = await session.get(User, owner_id)
    if user is None:
        raise Forbidden(f"The account '{owner_id}', in whose name this runs, does not exist.")
    if not user.is_active:
        raise AccountDisabled(f"The account of {user.username}, in whose name this runs, is disabled.")
    return principal(user, name)


def trusted(query: Query, table: type[Owned], principal: Principal) -> Query:
    """Of the rows of this query those that the principal, an administrator or the platform has made."""
    administrators = select(User.id).where(User.role == "admin")
    owner_id = table.owner_id
    return query.where(or_(owner_id.is_(None), owner_id == principal.id, owner_id.in_(administrators)))


def principal(user: User, name: str | None = None) -> Principal:
    return Principal(id=user.id, name=name or user.username, is_admin=user.role == "admin")


def require_active(user: User | None) -> User:
    if user is None:
        raise Unauthenticated()
    if not user.is_active:
        raise AccountDisabled()
    return user
