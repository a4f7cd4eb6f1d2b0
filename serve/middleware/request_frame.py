"""The outermost middleware: the id, the metrics and the log line of each request, and its unexpected errors.

Plain ASGI, because its cost is a part of every request.
"""

import logging
import re
from secrets import token_hex
from time import perf_counter

from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import ForgearrError
from cluster.logs import request_address, request_id
from serve.http.errors import route_template
from serve.monitoring.metrics import RequestMetrics
from serve.security.callers import send_error
from serve.security.rate_limits import client_address

SLOW_SECONDS = 1.0
CLIENT_CLOSED_REQUEST = 499
RESPONSE_START_TYPES = {"http.response.start", "websocket.accept", "websocket.http.response.start"}
DO_NOT_GUESS = (b"x-content-type-options", b"nosniff")
"""No browser may render text of a model or a person as a page, because it looks like one."""
VALID_REQUEST_ID = re.compile(rb"[\w.:-]{1,128}", re.ASCII)

logger = logging.getLogger(__name__)


class RequestContextMiddleware:
    """Sets the request id and the client's address, measures and logs the request, responds to unknown exceptions."""

    def __init__(self, app: ASGIApp, metrics: RequestMetrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in {"http", "websocket"}:
            return await self.app(scope, receive, send)
        identifier = _request_id(scope)
        token = request_id.set(identifier.decode())
        address_token = request_address.set(client_address(HTTPConnection(scope)))
        started = perf_counter()
        status, seconds = 0, 0.0

        async def send_with_id(message: Message) -> None:
            nonlocal status, seconds
            if message["type"] in RESPONSE_START_TYPES:
                status, seconds = message.get("status", 101), perf_counter() - started
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", identifier), DO_NOT_GUESS]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            logger.debug("%s: the client disconnected before the end of its request.", _line(scope))
        except Exception:
            logger.exception("%s failed.", _line(scope))
            if status:
                raise  # too late for an error response: the server closes the connection
            await send_error(ForgearrError(), scope, receive, send_with_id)
        finally:
            if not status:
                status, seconds = CLIENT_CLOSED_REQUEST, perf_counter() - started
            if scope["type"] == "http":
                self.metrics.observe(scope["method"], route_template(scope) or "(none)", status, seconds)
            _log(scope, status, seconds)
            request_id.reset(token)
            request_address.reset(address_token)


def _request_id(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and VALID_REQUEST_ID.fullmatch(value):
            return value
    return token_hex(16).encode()


def _log(scope: Scope, status: int, seconds: float) -> None:
    is_problem = status >= 500 or seconds > SLOW_SECONDS
    level = logging.WARNING if is_problem else logging.DEBUG
    if logger.isEnabledFor(level):
        logger.log(level, "%s %d in %.0f ms", _line(scope), status, seconds * 1000)


def _line(scope: Scope) -> str:
    # Without the query, which may contain the credential of a WebSocket.
    return f"{scope.get('method', 'WebSocket')} {scope['path']}"
