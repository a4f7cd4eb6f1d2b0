"""Middleware that protects a server without credentials from foreign web pages, by Host and Origin."""

import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.errors import CrossOrigin
from cluster.settings import LOOPBACK, get_settings
from serve.security.callers import send_error


class OriginGuard:
    """Rejects requests of foreign web pages, if the server needs no credential.

    A browser on this machine can reach such a server, and so can any page in it. Three headers reveal a foreign page:
    Host (a domain of its own that resolves to this machine), Origin, and Sec-Fetch-Site.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in {"http", "websocket"} and not get_settings().auth_required and not _is_own_page(scope):
            return await send_error(CrossOrigin(), scope, receive, send)
        await self.app(scope, receive, send)


def _is_own_page(scope: Scope) -> bool:
    settings = get_settings().serve
    headers = Headers(scope=scope)
    host = headers.get("host", "").lower()
    if _host_name(host) not in LOOPBACK | {name.lower() for name in settings.allowed_hosts}:
        return False
    origin = headers.get("origin")
    if origin in settings.allowed_origins:
        return True
    scheme = {"ws": "http", "wss": "https"}.get(scope["scheme"], scope["scheme"])
    if origin is not None and origin.lower() != f"{scheme}://{host}":
        return False
    return headers.get("sec-fetch-site", "none") in {"same-origin", "none"}


def _host_name(host: str) -> str | None:
    """The name in `name:port` or `[address]:port`; None if it is anything else."""
    match = re.fullmatch(r"\[([0-9a-f:.]+)\](:\d+)?|([a-z0-9._-]+)(:\d+)?", host)
    return match and (match[1] or match[3])
