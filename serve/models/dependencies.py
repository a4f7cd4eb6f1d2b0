"""The objects of the application that the routes of models use: the engine and the resolver of names."""

from fastapi import Request

from serve.engines.protocol import Engine
from serve.models.resolver import ModelResolver


def get_models(request: Request) -> ModelResolver:
    return request.app.state.models


def get_engine(request: Request) -> Engine:
    return request.app.state.engine
