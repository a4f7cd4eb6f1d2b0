"""Builds the Ray Serve application: the gateway and the engines as deployments."""

from collections.abc import Iterator
from typing import Any

from cluster.settings import EngineSettings, Settings
from serve.app import create_app
from serve.engines.factory import GGUF, TRANSFORMERS

MAX_ONGOING_REQUESTS = 10_000
"""Per replica. A WebSocket or a stream counts as one request until it ends."""
SHUTDOWN_SECONDS = 5.0


def build_application(settings: Settings) -> Any:
    """The application for `ray.serve.run`."""
    from ray import serve as ray_serve

    from serve.gateway import Gateway

    deployment = ray_serve.deployment(
        name="gateway",
        num_replicas=settings.serve.replicas,
        **_deployment_options(MAX_ONGOING_REQUESTS),
    )
    # Serve calls the function in each replica. It would have to pickle an application.
    gateway: Any = deployment(ray_serve.ingress(create_app)(Gateway))
    return gateway.bind(*_engine_deployments(settings.engines))


def _engine_deployments(settings: EngineSettings) -> Iterator[Any]:
    """Engines reserve no GPU, so that none is missing for trainings. They use the memory that is free on it."""
    from ray import serve as ray_serve

    from serve.engines.gguf.replica import GgufReplica
    from serve.engines.transformers.replica import TransformersReplica

    deployment: Any = ray_serve.deployment
    options = _deployment_options(MAX_ONGOING_REQUESTS)
    if settings.replicas:
        scale = _scaling_options(settings, settings.least_replicas, settings.replicas)
        yield deployment(name=GGUF, **scale, **options)(GgufReplica).bind()
    if settings.transformers_replicas:
        scale = _scaling_options(settings, 0, settings.transformers_replicas)
        yield deployment(name=TRANSFORMERS, **scale, **options)(TransformersReplica).bind()


def _scaling_options(settings: EngineSettings, min_replicas: int | None, max_replicas: int) -> dict[str, Any]:
    if min_replicas is None or min_replicas >= max_replicas:
        return {"num_replicas": max_replicas}
    autoscaling = {
        "min_replicas": min_replicas,
        "max_replicas": max_replicas,
        "target_ongoing_requests": settings.slots,
        "upscale_delay_s": 0,
        "downscale_delay_s": settings.idle_seconds,
        "downscale_to_zero_delay_s": settings.idle_seconds,
    }
    return {"autoscaling_config": autoscaling}


def _deployment_options(max_ongoing_requests: int) -> dict[str, Any]:
    return {
        "max_ongoing_requests": max_ongoing_requests,
        "ray_actor_options": {"num_cpus": 0},
        "graceful_shutdown_timeout_s": SHUTDOWN_SECONDS,
        "graceful_shutdown_wait_loop_s": 0.5,
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
    }
