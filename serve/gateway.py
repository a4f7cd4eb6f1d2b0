"""The deployment class of the gateway: in each of its replicas, Ray Serve runs the application.

It has no health check of its own. A new replica would not repair the database, and Ray notices a blocked event loop.
"""

from functools import partial

from starlette.types import ASGIApp, Receive, Scope, Send

from cluster import logs

MAX_MESSAGE_BYTES = 65_536
"""Of a WebSocket. The server refuses a longer message while it arrives; the hub's own limit is below."""


class Gateway:
    def __init__(self, *engines: object) -> None:
        """The engines are not used here. As arguments they become part of the same application."""
        logs.configure("gateway")
        _disable_ray_request_ids()
        _limit_websocket_messages()


def _disable_ray_request_ids() -> None:
    """Ray would add a second X-Request-ID to every response, with an id of its own."""
    from ray.serve._private import http_util

    http_util.RequestIdMiddleware = _PassThroughMiddleware  # pyright: ignore[reportAttributeAccessIssue]


def _limit_websocket_messages() -> None:
    """Ray has no setting for uvicorn's limit, which is 16 MiB of memory for each connection."""
    import uvicorn

    uvicorn.Config = partial(uvicorn.Config, ws_max_size=MAX_MESSAGE_BYTES)  # pyright: ignore[reportAttributeAccessIssue]


class _PassThroughMiddleware:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)
