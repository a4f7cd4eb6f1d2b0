"""What the doors to models share: the engine, the names, and patience only as long as somebody listens."""

from fastapi import Request

from serve.engines.protocol import Engine
from serve.models.resolver import ModelResolver


def get_models(request: Request) -> ModelResolver:
    return request.app.state.models


def get_engine(request: Request) -> Engine:
    return request.app.state.engine
