"""The guard in front of MLflow's server, which itself would serve every program and many web pages of this machine.

A request must name the server by an address of loopback, else a page could reach it under a name of its own that
points here (DNS rebinding). It must not come from a page of another origin, since a browser sends the password along.
And it needs the password of this installation: as Basic, for people with a browser, or as Bearer.
"""

import hmac
from base64 import b64encode
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from cluster import secrets
from cluster.settings import get_settings

HEALTH = "/health"
"""The only path without a password. It says no more than that MLflow runs."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class MlflowGuard:
    """An ASGI application that passes on what may reach MLflow, and refuses the rest."""

    def __init__(self, application: Application, port: int, password: str) -> None:
        self._application = application
        self._hosts = {f"127.0.0.1:{port}".encode(), f"localhost:{port}".encode()}
        pair = b64encode(f"{secrets.MLFLOW_USER}:{password}".encode())
        self._credentials = (b"basic " + pair, b"bearer " + password.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = None if scope["type"] == "lifespan" else self._refusal(scope)
        if refusal is None:
            return await self._application(scope, receive, send)
        status, text = refusal
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
        if status == 401:
            headers.append((b"www-authenticate", b'Basic realm="MLflow of Forgearr", charset="UTF-8"'))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        return await send({"type": "http.response.body", "body": text.encode()})

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if headers.get(b"host", b"") not in self._hosts:
            return 403, "This MLflow is reached at 127.0.0.1 or localhost only."
        origin = headers.get(b"origin")
        if origin is not None and origin.removeprefix(b"http://") not in self._hosts:
            return 403, "This MLflow refuses requests from web pages of other origins."
        if scope["type"] == "http" and scope["path"] == HEALTH:
            return None
        scheme, _, value = headers.get(b"authorization", b"").partition(b" ")
        given = scheme.lower() + b" " + value.strip()
        matches = [hmac.compare_digest(given, expected) for expected in self._credentials]
        if any(matches):
            return None
        return 401, "This MLflow needs a password: `forgearr access` shows it."


def create_app() -> Application:
    from mlflow.server.fastapi_app import app

    return MlflowGuard(app, get_settings().mlflow.port, secrets.mlflow_password())
