"""The routes /api/v1/auth: accounts, logins and API keys."""

from datetime import timedelta
from typing import Annotated, Literal, Self
from uuid import UUID

from fastapi import APIRouter, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, StrictBool, model_validator

from cluster import audit_log, identity
from cluster.db import get_database, now
from cluster.errors import AccountDisabled, Conflict, Forbidden, ForgearrError, Unauthenticated
from cluster.settings import get_settings
from cluster.times import RequestTime, UtcTime
from serve.http.marks import access
from serve.http.pagination import Page, PaginationParams
from serve.security.callers import CurrentCaller, OptionalCaller, authenticate_again
from serve.security.rate_limits import check_login, client_address, count_failed_login

MAX_KEY_DAYS = 3650

router = APIRouter(prefix="/api/v1/auth")


class RegistrationClosed(Forbidden):
    """Only an administrator may create accounts on this server."""

    code = "REGISTRATION_CLOSED"


class RefreshTokenInvalid(Unauthenticated):
    """The refresh token is no longer valid. Log in again."""


class AccountRequired(Conflict):
    """This needs an account, and the request has none: create one with `forgearr user add` and log in."""

    code = "ACCOUNT_REQUIRED"


class WrongPassword(Forbidden):
    """The current password is wrong."""

    code = "WRONG_PASSWORD"


def _validate_email(text: str) -> str:
    try:
        return identity.normalize_email(text)
    except ForgearrError as error:
        raise ValueError(error.message) from error


# Control characters in a name are a mistake, and PostgreSQL cannot store all of them.
Text = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$")]
Email = Annotated[Text, Field(max_length=254, json_schema_extra={"format": "email"}), AfterValidator(_validate_email)]
Password = Annotated[SecretStr, Field(min_length=identity.MIN_PASSWORD_LENGTH, max_length=identity.MAX_PASSWORD_LENGTH)]
Token = Annotated[SecretStr, Field(min_length=1, max_length=500)]


class Registration(BaseModel):
    email: Email
    username: Annotated[str, Field(pattern=identity.USERNAME_PATTERN)]
    password: Password
    full_name: Text | None = None


class Login(BaseModel):
    email: Text
    password: Annotated[SecretStr, Field(min_length=1, max_length=identity.MAX_PASSWORD_LENGTH)]


class RefreshTokenBody(BaseModel):
    refresh_token: Token


class Logout(RefreshTokenBody):
    everywhere: StrictBool = Field(
        False,
        description="End all logins of the account with their access tokens, and revoke all its API keys. It needs a "
        "refresh token that is still valid.",
    )


class PasswordChange(BaseModel):
    model_config = ConfigDict(extra="forbid")

    current_password: Annotated[SecretStr, Field(min_length=1, max_length=identity.MAX_PASSWORD_LENGTH)]
    new_password: Password


class Tokens(BaseModel):
    access_token: str
    refresh_token: str = Field(description="Can be used once: the response has the next one.")
    token_type: Literal["bearer"] = "bearer"  # noqa: S105
    expires_in: int = Field(description="Seconds until the access token expires.")


class Account(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: str | None = Field(description="Null: the local user of a server that needs no credential.")
    email: str | None
    username: str
    full_name: str | None
    role: identity.Role
    created_at: UtcTime | None
    last_login_at: UtcTime | None


class ApiKeyRequest(BaseModel):
    model_config = ConfigDict(strict=True)

    name: Text
    expires_at: RequestTime | None = Field(None, description="When it expires. Null: never.")
    expires_in_days: int | None = Field(None, ge=1, le=MAX_KEY_DAYS, description="Days until it expires.")

    @model_validator(mode="after")
    def validate_expiry(self) -> Self:
        if self.expires_at and self.expires_in_days:
            raise ValueError("send either expires_at or expires_in_days, not both")
        if self.expires_at and not now() < self.expires_at <= now() + timedelta(days=MAX_KEY_DAYS):
            raise ValueError(f"expires_at must be within the next {MAX_KEY_DAYS} days")
        return self


class ApiKeyView(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: str
    name: str
    prefix: str = Field(description="The first characters of the key.")
    created_at: UtcTime
    last_used_at: UtcTime | None = Field(description="Accurate to the minute.")
    expires_at: UtcTime | None


class CreatedApiKey(ApiKeyView):
    key: str = Field(description="The key itself. It is not shown again.")


@router.post("/register", status_code=201)
@access("registration")
async def register(body: Registration, caller: OptionalCaller) -> Account:
    """Create an account. If registration is closed, only administrators may do this."""
    if not get_settings().registration_open and not (caller and caller.is_admin):
        raise RegistrationClosed()
    password_hash = await identity.hash_password(body.password.get_secret_value(), body.username, body.email)
    async with get_database().transaction() as session:
        user = await identity.add_user(
            session,
            email=body.email,
            username=body.username,
            full_name=body.full_name,
            password_hash=password_hash,
        )
        audit_log.record(session, "account.create", caller or identity.principal(user), user.email, role=user.role)
    return Account.model_validate(user)


@router.post("/login")
@access("public")
async def login(body: Login, request: Request) -> Tokens:
    """Exchange an email and a password for an access token and a refresh token."""
    async with get_database().read_transaction() as session:
        user = await identity.find_user(session, body.email)
    if not await _is_password(user, body.email, body.password, request) or user is None:
        # An email without an account is not recorded: people type passwords there by mistake.
        await audit_log.record_alone("login", None, user and user.email, outcome="failed")
        raise Unauthenticated("The email or the password is wrong.")
    if not user.is_active:
        reason = AccountDisabled()
        await audit_log.record_alone("login", None, user.email, outcome="refused", reason=reason.message)
        raise reason
    async with get_database().transaction() as session:
        refresh_token = await identity.start_login(session, user)
        audit_log.record(session, "login", identity.principal(user))
    return _tokens(user, refresh_token)


@router.post("/refresh")
@access("public")
async def refresh(body: RefreshTokenBody) -> Tokens:
    """Exchange a refresh token for new tokens. It can be used once: a second use ends the whole login."""
    async with get_database().transaction() as session:
        rotated = await identity.rotate_refresh_token(session, body.refresh_token.get_secret_value())
    if rotated is None:
        raise RefreshTokenInvalid()
    return _tokens(*rotated)


@router.post("/logout", status_code=204)
@access("public")
async def logout(body: Logout) -> None:
    """End the login of a refresh token, or with `everywhere` all credentials of its account."""
    token = body.refresh_token.get_secret_value()
    async with get_database().transaction() as session:
        if body.everywhere:
            user = await identity.user_from_refresh_token(session, token)
            if user is None:
                raise RefreshTokenInvalid()
            await identity.end_all_credentials(session, user)
        else:
            user = await identity.end_login(session, token)
        if user is not None:
            audit_log.record(session, "logout", identity.principal(user), everywhere=body.everywhere)


@router.put("/password")
async def change_password(body: PasswordChange, request: Request, caller: CurrentCaller) -> Tokens:
    """Change your own password. All logins end and all API keys are revoked; the response has a new login."""
    if caller.id is None:
        raise AccountRequired()
    async with get_database().read_transaction() as session:
        user = await session.get_one(identity.User, caller.id)
    if not await _is_password(user, user.email, body.current_password, request):
        await audit_log.record_alone("password.change", caller, user.email, outcome="failed")
        raise WrongPassword()
    password_hash = await identity.hash_password(body.new_password.get_secret_value(), user.username, user.email)
    async with get_database().transaction() as session:
        user = await identity.lock_unchanged(session, user)
        await identity.set_password(session, user, password_hash)
        refresh_token = await identity.start_login(session, user)
        audit_log.record(session, "password.change", caller, user.email)
    return _tokens(user, refresh_token)


@router.get("/me")
async def me(caller: CurrentCaller) -> Account:
    """Get your own account."""
    if caller.id is None:
        return Account(
            id=None,
            email=None,
            username=caller.name,
            full_name=None,
            role="admin" if caller.is_admin else "user",
            created_at=None,
            last_login_at=None,
        )
    async with get_database().read_transaction() as session:
        return Account.model_validate(await session.get_one(identity.User, caller.id))


@router.post("/keys", status_code=201)
async def create_key(body: ApiKeyRequest, request: Request, caller: CurrentCaller) -> CreatedApiKey:
    """Create an API key for your account. Only this response shows the key.

    A key that is made with another key may not live longer than that one.
    """
    if caller.id is None:
        raise AccountRequired()
    expires_at = now() + timedelta(days=body.expires_in_days) if body.expires_in_days else body.expires_at
    async with get_database().transaction() as session:
        user, own_key = await authenticate_again(session, request)
        key, token = await identity.create_key(session, user.id, body.name, expires_at, made_with=own_key)
        expiry = key.expires_at and key.expires_at.isoformat()
        audit_log.record(session, "key.create", caller, key.id, name=key.name, expires_at=expiry)
    return CreatedApiKey(**ApiKeyView.model_validate(key).model_dump(), key=token)


@router.get("/keys")
async def list_keys(caller: CurrentCaller, paging: PaginationParams) -> Page[ApiKeyView]:
    """List your API keys."""
    if caller.id is None:
        return paging.page([], 0)
    async with get_database().read_transaction() as session:
        keys = paging.cut(await identity.list_keys(session, caller.id))
    return paging.page([ApiKeyView.model_validate(key) for key, _ in keys.items], keys.total)


@router.delete("/keys/{key_id}", status_code=204)
async def revoke_key(key_id: UUID, caller: CurrentCaller) -> None:
    """Revoke one of your API keys. It is invalid at once."""
    if caller.id is None:
        raise identity.KeyNotFound()
    async with get_database().transaction() as session:
        await identity.revoke_key(session, str(key_id), caller.id)
        audit_log.record(session, "key.revoke", caller, str(key_id))


async def _is_password(user: identity.User | None, email: str, password: SecretStr, request: Request) -> bool:
    """Whether this is the password of the user with this email. If it is not, that counts as a failed login."""
    address = client_address(request)
    await check_login(email, address)
    if not await identity.verify_password(user, password.get_secret_value()):
        await count_failed_login(email, address)
        return False
    # Again: concurrent guesses all passed the first check, and must not learn which of them was right.
    await check_login(email, address)
    return True


def _tokens(user: identity.User, refresh_token: str) -> Tokens:
    return Tokens(
        access_token=identity.create_access_token(user),
        refresh_token=refresh_token,
        expires_in=get_settings().auth.access_token_minutes * 60,
    )
