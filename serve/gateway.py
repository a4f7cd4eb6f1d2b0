"""A gateway replica: the process in which Ray Serve runs the application.

It has no health check of its own, and none that asks for the database: replacing a replica does not bring a database
back. Ray already sees whether its event loop turns.
"""

from starlette.types import ASGIApp, Receive, Scope, Send

from cluster import logs


class Gateway:
    def __init__(self, *engines: object) -> None:
        """Of the engines it is told only so that Serve runs them beside it."""
        logs.configure("gateway")
        _disable_ray_request_ids()


def _disable_ray_request_ids() -> None:
    """Ray adds an X-Request-ID of its own to every answer, whatever the client sent, beside the application's."""
    from ray.serve._private import http_util

    http_util.RequestIdMiddleware = _PassThroughMiddleware  # pyright: ignore[reportAttributeAccessIssue]


class _PassThroughMiddleware:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)
