"""Adds the middleware to the application, in the right order."""

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from cluster.settings import get_settings
from serve.middleware.disk_space import DiskSpaceMiddleware
from serve.middleware.request_frame import RequestContextMiddleware
from serve.middleware.strict_input import InputValidationMiddleware
from serve.security.origins import OriginGuard
from serve.security.rate_limits import RateLimitMiddleware


def add_middleware(app: FastAPI) -> None:
    """Each middleware that is added surrounds those before it."""
    app.add_middleware(InputValidationMiddleware)
    app.add_middleware(DiskSpaceMiddleware)
    app.add_middleware(RateLimitMiddleware)
    app.add_middleware(OriginGuard)
    if origins := get_settings().serve.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[
                "X-Request-ID",
                "X-RateLimit-Limit",
                "X-RateLimit-Remaining",
                "X-RateLimit-Reset",
                "Retry-After",
            ],
        )
    app.add_middleware(RequestContextMiddleware, metrics=app.state.metrics)
