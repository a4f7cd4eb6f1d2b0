"""Rate limits of all requests, and of failed logins.

A window starts with the first request of a caller. A caller is the owner of a valid credential, otherwise an address,
so invented credentials give no new allowance. If the storage of the counts is down, requests are not limited: a broken
Redis must not stop the service.
"""

import logging
import os
import time
from functools import cache
from ipaddress import IPv6Address, ip_address, ip_network
from math import ceil
from typing import cast

from limits import RateLimitItem, parse
from limits.aio.storage import Storage
from limits.aio.strategies import FixedWindowRateLimiter
from limits.errors import StorageError
from limits.storage import storage_from_string
from limits.util import WindowStats
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster import identity
from cluster.errors import RateLimitExceeded
from cluster.settings import get_settings
from serve.http.mounts import marks_of
from serve.security.callers import find_known_caller, send_error

STORAGE_TIMEOUT_SECONDS = 1.0

logger = logging.getLogger(__name__)


class RateLimitMiddleware:
    """Counts each request, rejects those over the limit, and sets the X-RateLimit headers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in {"http", "websocket"} or not get_settings().limits_enabled:
            return await self.app(scope, receive, send)
        limit, caller = await _limit_and_caller(scope)
        try:
            allowed = await limiter().hit(limit, *caller)
            window = await limiter().get_window_stats(limit, *caller)
        except StorageError as error:
            _warn(error)
            return await self.app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] in {"http.response.start", "websocket.http.response.start"}:
                headers = MutableHeaders(scope=message)
                headers["X-RateLimit-Limit"] = str(limit.amount)
                headers["X-RateLimit-Remaining"] = str(window.remaining)
                headers["X-RateLimit-Reset"] = str(ceil(window.reset_time))
            await send(message)

        if not allowed:
            return await send_error(_exceeded(window), scope, receive, send_with_headers)
        await self.app(scope, receive, send_with_headers)


async def check_login(email: str, address: str) -> None:
    """Reject a login if too many have failed from its address: of this account, or of all accounts together.

    Failures from other addresses do not count: nobody may lock another out by guessing.
    """
    try:
        for limit, caller in _login_limits(email, address):
            if not await limiter().test(limit, *caller):
                raise _exceeded(await limiter().get_window_stats(limit, *caller))
    except StorageError as error:
        _warn(error)


async def count_failed_login(email: str, address: str) -> None:
    """Count a failed login, and reject it if it is over the limit.

    Concurrent guesses all pass `check_login`. Over the limit, wrong ones must get the same response as right ones.
    """
    try:
        limits = _login_limits(email, address)
        over = [(limit, caller) for limit, caller in limits if not await limiter().hit(limit, *caller)]
        for limit, caller in over:
            raise _exceeded(await limiter().get_window_stats(limit, *caller))
    except StorageError as error:
        _warn(error)


def client_address(connection: HTTPConnection) -> str:
    """The address of the client, which the client cannot forge.

    Behind Ray Serve's HAProxy the peer is HAProxy, and uvicorn takes the address from X-Forwarded-For.
    FORWARDED_ALLOW_IPS says that HAProxy appends that header (`option forwardfor`), and which peers to trust. Without
    it, the client could have set the header itself.
    """
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" and not os.environ.get("FORWARDED_ALLOW_IPS"):
        return "proxy"
    if connection.client is None:
        return "unknown"
    try:
        address = ip_address(connection.client.host)
    except ValueError:
        return "unknown"
    if not isinstance(address, IPv6Address):
        return str(address)
    # A client usually has a whole /64, and so 2^64 addresses.
    return str(address.ipv4_mapped or ip_network((address, 64), strict=False))


@cache
def limiter() -> FixedWindowRateLimiter:
    """The limiter. Its counts are those of this process, or with Redis those of all processes."""
    storage = storage_from_string(
        f"async+{get_settings().limits.storage.get_secret_value()}",
        implementation="redispy",
        wrap_exceptions=True,
        socket_timeout=STORAGE_TIMEOUT_SECONDS,
        socket_connect_timeout=STORAGE_TIMEOUT_SECONDS,
    )
    return FixedWindowRateLimiter(cast(Storage, storage))


async def _limit_and_caller(scope: Scope) -> tuple[RateLimitItem, tuple[str, str]]:
    connection = HTTPConnection(scope)
    settings = get_settings().limits
    name = marks_of(scope).rate_limit
    limit = _parse(getattr(settings, name))
    if name == "health":
        # By address: to check the credential needs the database, and /health must respond without it.
        return limit, (name, client_address(connection))
    caller = await find_known_caller(connection)  # the route raises the error of a wrong credential
    if caller is None or caller.id is None:
        return limit, (name, client_address(connection))
    return limit, (name, f"user {caller.id}")


def _login_limits(email: str, address: str) -> list[tuple[RateLimitItem, tuple[str, ...]]]:
    settings = get_settings().auth
    return [
        (_parse(settings.login_attempts), ("login account", identity.canonical_email(email), address)),
        (_parse(settings.address_login_attempts), ("login address", address)),
    ]


def _exceeded(window: WindowStats) -> RateLimitExceeded:
    return RateLimitExceeded(retry_after=max(1, ceil(window.reset_time - time.time())))


def _warn(error: StorageError) -> None:
    logger.warning(
        "Rate limits are not applied: their storage is unreachable (%s).", type(error.storage_error).__name__
    )


@cache
def _parse(limit: str) -> RateLimitItem:
    return parse(limit)
