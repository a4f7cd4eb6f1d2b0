"""Builds the FastAPI application of the gateway.

`create_app()` also runs under plain uvicorn. Only features that need Ray's actors do not work there.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from cluster.db import get_database
from serve.engines.factory import build_engine
from serve.http.error_handlers import handle_errors
from serve.http.errors import ERROR_RESPONSES
from serve.http.mounts import mount_all
from serve.middleware.stack import add_middleware
from serve.models.resolver import ModelResolver
from serve.monitoring import health, version
from serve.monitoring.metrics import RequestMetrics
from serve.realtime.feeds import follow_events, follow_logs, follow_system
from serve.realtime.hub import Hub
from serve.routes import MOUNTS
from serve.servers.live import LiveServers
from serve.servers.socket import ServerSocket

FINAL_METRICS_SECONDS = 1.0


def create_app() -> FastAPI:
    # /docs and /redoc load their scripts from this server, not from a CDN.
    app = FastAPIOffline(
        title="Forgearr",
        description="Trains, ships and runs a private assistant. Everything slow is a job.",
        version=version.VERSION,
        openapi_url="/api/v1/openapi.json",
        responses=ERROR_RESPONSES["native"],
        lifespan=_lifespan,
    )
    app.state.hub = Hub(follow_events)
    app.state.system_hub = Hub(follow_system)
    app.state.log_hub = Hub(follow_logs)
    app.state.health = health.HealthCheck()
    app.state.metrics = RequestMetrics()
    app.state.servers = LiveServers()
    app.state.server_socket = ServerSocket(app.state.servers)
    app.state.models = ModelResolver()
    app.state.engine = build_engine()
    mount_all(app, MOUNTS)
    handle_errors(app)
    add_middleware(app)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncGenerator[None]:
    metrics: RequestMetrics = app.state.metrics
    sharing = asyncio.create_task(metrics.share_periodically())
    yield
    sharing.cancel()
    await get_database().close()
    with suppress(TimeoutError):  # at shutdown the events actor may be gone already
        async with asyncio.timeout(FINAL_METRICS_SECONDS):
            await metrics.share()
