"""Builds the gateway: the FastAPI application, and its deployment on Ray Serve.

`create_app()` also runs under plain uvicorn, where everything works but what needs Ray's actors.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware

from cluster.db import get_database
from cluster.settings import EngineSettings, Settings, get_settings
from serve.api import (
    auth,
    batches,
    chat,
    completions,
    config,
    datasets,
    downloads,
    embeddings,
    engines,
    feedback,
    files,
    fine_tuning,
    forge,
    health,
    job_events,
    jobs,
    media,
    model_names,
    models,
    movies,
    ollama,
    ollama_blobs,
    ollama_making,
    ollama_models,
    prompts,
    recovery,
    repositories,
    rerank,
    responses,
    retrain,
    schedules,
    service_health,
    service_tools,
    services,
    settings,
    shows,
    training,
    training_workers,
    uploads,
    webhooks,
    websockets,
)
from serve.auth import OriginGuard
from serve.engines.installed import GGUF, TRANSFORMERS, installed
from serve.envelope import ERROR_RESPONSES, handle_errors
from serve.feeds import follow_events, follow_logs, follow_system
from serve.limits import RateLimits
from serve.metrics import RequestMetrics
from serve.middleware import RequestFrame, StrictInput
from serve.models import Models
from serve.realtime import Hub

MAX_ONGOING_REQUESTS = 10_000
"""Per replica. A WebSocket or a followed stream is one for as long as it lasts."""
SHUTDOWN_SECONDS = 5.0
LAST_WORDS_SECONDS = 1.0


def create_app() -> FastAPI:
    # The pages of /docs and /redoc come from here, not from somebody's CDN.
    app = FastAPIOffline(
        title="Forgearr",
        description="Trains, ships and runs a private assistant. Everything slow is a job.",
        version=health.VERSION,
        openapi_url="/api/v1/openapi.json",
        responses=ERROR_RESPONSES,
        lifespan=_lifespan,
    )
    app.state.hub = Hub(follow_events)
    app.state.system_hub = Hub(follow_system)
    app.state.log_hub = Hub(follow_logs)
    app.state.health = health.HealthCheck()
    app.state.metrics = RequestMetrics()
    app.state.models = Models()
    app.state.engine = installed()
    for module in (
        health,
        service_health,
        services,
        shows,
        movies,
        downloads,
        media,
        service_tools,
        recovery,
        config,
        settings,
        auth,
        jobs,
        job_events,
        schedules,
        feedback,  # before prompts, where from-feedback else would be one
        prompts,
        datasets,
        repositories,
        webhooks,
        training,
        training_workers,
        forge,
        models,
        engines,
        model_names,
        chat,
        completions,
        responses,
        batches,
        embeddings,
        rerank,
        files,
        uploads,
        fine_tuning,
        ollama,
        ollama_models,
        ollama_blobs,
        ollama_making,
        websockets,
    ):
        app.include_router(module.router)
    app.include_router(forge.openai_router)
    app.include_router(repositories.openai_router)
    app.include_router(retrain.router)  # after /v1/retrain/monitor, which else would be a job
    handle_errors(app)
    _surround(app)
    return app


def build_application(settings: Settings) -> Any:
    """The gateway, and the engines behind it, as an application for `ray.serve.run`."""
    from ray import serve as ray_serve

    from serve.gateway import Gateway

    deployment = ray_serve.deployment(
        name="gateway",
        num_replicas=settings.serve.replicas,
        **_deployed(MAX_ONGOING_REQUESTS),
    )
    # A function is called in each replica; an application would have to be pickled.
    gateway: Any = deployment(ray_serve.ingress(create_app)(Gateway))
    return gateway.bind(*_engines(settings.engines))


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncGenerator[None]:
    metrics: RequestMetrics = app.state.metrics
    sharing = asyncio.create_task(metrics.keep_shared())
    yield
    sharing.cancel()
    await get_database().close()
    with suppress(TimeoutError):  # when everything stops, there may be nobody left to tell
        async with asyncio.timeout(LAST_WORDS_SECONDS):
            await metrics.share()


def _engines(settings: EngineSettings) -> Iterator[Any]:
    """They take no GPU for themselves, and so none away from training: what is free there, they use."""
    from ray import serve as ray_serve

    from serve.engines.gguf import GgufReplica
    from serve.engines.transformers import TransformersReplica

    deployment: Any = ray_serve.deployment
    deployed = _deployed(MAX_ONGOING_REQUESTS)
    if settings.replicas:
        scale = _scale(settings, settings.least_replicas, settings.replicas)
        yield deployment(name=GGUF, **scale, **deployed)(GgufReplica).bind()
    if settings.transformers_replicas:
        scale = _scale(settings, 0, settings.transformers_replicas)
        yield deployment(name=TRANSFORMERS, **scale, **deployed)(TransformersReplica).bind()


def _scale(settings: EngineSettings, least: int | None, most: int) -> dict[str, Any]:
    if least is None or least >= most:
        return {"num_replicas": most}
    wanted = {
        "min_replicas": least,
        "max_replicas": most,
        "target_ongoing_requests": settings.slots,
        "upscale_delay_s": 0,
        "downscale_delay_s": settings.idle_seconds,
        "downscale_to_zero_delay_s": settings.idle_seconds,
    }
    return {"autoscaling_config": wanted}


def _deployed(requests: int) -> dict[str, Any]:
    return {
        "max_ongoing_requests": requests,
        "ray_actor_options": {"num_cpus": 0},
        "graceful_shutdown_timeout_s": SHUTDOWN_SECONDS,
        "graceful_shutdown_wait_loop_s": 0.5,
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
    }


def _surround(app: FastAPI) -> None:
    """The layers around every route. Each one added surrounds those before it."""
    app.add_middleware(StrictInput)
    app.add_middleware(RateLimits)
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
    app.add_middleware(RequestFrame, metrics=app.state.metrics)
