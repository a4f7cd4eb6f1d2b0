"""What the doors to models share: the engine, the names, and patience only as long as somebody listens."""

from fastapi import Request

from serve.engines.protocol import Engine
from serve.models.resolver import Models


def models_of(request: Request) -> Models:
    return request.app.state.models


def engine_of(request: Request) -> Engine:
    return request.app.state.engine
