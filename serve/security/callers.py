"""Authenticates requests: finds the caller by the credential.

A request is authenticated once, where the caller is needed first (in the rate limits or the route). The result is
stored in the ASGI scope.
"""

import logging
from typing import Annotated

from fastapi import Depends, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.requests import HTTPConnection
from starlette.types import Receive, Scope, Send

from cluster import identity
from cluster.db import DatabaseUnavailable, get_database, is_transient
from cluster.errors import AccountDisabled, Forbidden, ForgearrError, Unauthenticated
from cluster.ownership import LOCAL, Principal
from cluster.settings import get_settings
from serve.http.errors import error_response
from serve.http.marks import access
from serve.http.mounts import marks_of

log = logging.getLogger(__name__)

CALLER_SCOPE_KEY = "forgearr.caller"
PLACEHOLDER_KEY = "not-needed"
"""OpenAI's clients need a key. The documentation tells users of an open server to set this one, which is ignored."""
POLICY_VIOLATION = 1008

# For the OpenAPI document only. They reject no request, because an open server needs no credential.
_api_key = APIKeyHeader(name="X-API-Key", auto_error=False, description="An API key (fgr_…).")
_bearer = HTTPBearer(auto_error=False, description="An API key or an access token.")


@access("user")
async def authenticate(connection: HTTPConnection) -> Principal:
    """The caller of an HTTP request or a WebSocket handshake; raises Unauthenticated or AccountDisabled."""
    caller = await find_caller(connection)
    if caller is None:
        raise Unauthenticated()
    return caller


async def find_caller(connection: HTTPConnection) -> Principal | None:
    """The caller; None if a credential is required and missing. A wrong credential raises an error."""
    if CALLER_SCOPE_KEY not in connection.scope:
        try:
            connection.scope[CALLER_SCOPE_KEY] = await _identify(connection)
        except ForgearrError as error:
            connection.scope[CALLER_SCOPE_KEY] = error
        except SQLAlchemyError as error:
            if not is_transient(error):
                raise
            log.warning("A credential cannot be checked: the database does not respond (%s).", type(error).__name__)
            connection.scope[CALLER_SCOPE_KEY] = DatabaseUnavailable()
    result = connection.scope[CALLER_SCOPE_KEY]
    if isinstance(result, ForgearrError):
        raise result
    return result


async def find_known_caller(connection: HTTPConnection) -> Principal | None:
    """The caller of a public route, which may tell more to one that is known. A wrong credential counts as none."""
    try:
        return await find_caller(connection)
    except ForgearrError:
        return None


async def authenticate_again(
    session: AsyncSession, connection: HTTPConnection
) -> tuple[identity.User, identity.ApiKey | None]:
    """The user of a request, and the API key that it has sent, as of now. The user's row is locked.

    A request is authenticated before its body, which may take hours to arrive. What makes new credentials asks again.
    """
    caller, credential = await authenticate(connection), _credential(connection)
    if caller.id is None or credential is None:
        raise Unauthenticated()
    # The lock comes first: whatever ends the credentials of an account has ended them by then, or waits.
    await session.execute(select(identity.User.id).where(identity.User.id == caller.id).with_for_update())
    return await _user_of(session, credential)


async def is_still_authorized(connection: HTTPConnection) -> bool:
    """Whether an open connection may continue: its credential may have expired or ended, or its account be disabled."""
    caller = await authenticate(connection)
    try:
        return await _identify(connection) == caller
    except (Unauthenticated, AccountDisabled):
        return False
    except SQLAlchemyError as error:
        log.warning("Open connections continue unchecked: the database does not respond (%s).", type(error).__name__)
        return True


async def _optional_caller(
    connection: HTTPConnection,
    _key: Annotated[object, Security(_api_key)],
    _token: Annotated[object, Security(_bearer)],
) -> Principal | None:
    return await find_caller(connection)


OptionalCaller = Annotated[Principal | None, Depends(_optional_caller)]


@access("user")
async def _current_caller(caller: OptionalCaller) -> Principal:
    if caller is None:
        raise Unauthenticated()
    return caller


CurrentCaller = Annotated[Principal, Depends(_current_caller)]


@access("admin")
async def _admin_caller(caller: CurrentCaller) -> Principal:
    if not caller.is_admin:
        raise Forbidden("Only an administrator may do this.")
    return caller


AdminCaller = Annotated[Principal, Depends(_admin_caller)]
# The security schemes of OpenAPI do not work with WebSockets.
SocketCaller = Annotated[Principal, Depends(authenticate)]


@access("admin")
async def _admin_socket_caller(caller: SocketCaller) -> Principal:
    return await _admin_caller(caller)


AdminSocketCaller = Annotated[Principal, Depends(_admin_socket_caller)]


async def send_error(error: ForgearrError, scope: Scope, receive: Receive, send: Send) -> None:
    """Send an error from a middleware, as the response to a request or a WebSocket handshake."""
    if scope["type"] == "websocket" and "websocket.http.response" not in scope.get("extensions", {}):
        return await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": error.message})
    await error_response(error, marks_of(scope).envelope)(scope, receive, send)


async def _identify(connection: HTTPConnection) -> Principal | None:
    credential = _credential(connection)
    required = get_settings().auth_required
    if credential is None or (credential == PLACEHOLDER_KEY and not required):
        return None if required else LOCAL
    async with get_database().read_transaction() as session:
        user, key = await _user_of(session, credential)
    if key is not None and identity.should_record_use(key):
        async with get_database().transaction() as session:
            await identity.record_use(session, key)
    return identity.principal(user)


async def _user_of(session: AsyncSession, credential: str) -> tuple[identity.User, identity.ApiKey | None]:
    if credential.startswith(f"{identity.KEY_PREFIX}_"):
        return await identity.user_from_key(session, credential)
    return await identity.user_from_access_token(session, credential), None


def _credential(connection: HTTPConnection) -> str | None:
    if (key := connection.headers.get("x-api-key")) is not None:
        return key
    if (authorization := connection.headers.get("authorization")) is not None:
        scheme, _, token = authorization.partition(" ")
        return token.strip() if scheme.lower() == "bearer" else ""
    if connection.scope["type"] == "websocket":
        # A browser cannot set headers on a WebSocket.
        return connection.query_params.get("api_key", connection.query_params.get("token"))
    return None
