"""The route /api/v1/engines: the models in memory, and those that are being loaded."""

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from cluster.times import UtcTime
from serve.engines.protocol import Phase
from serve.models.dependencies import get_engine, get_models
from serve.security.callers import CurrentCaller

router = APIRouter(prefix="/api/v1/engines")


class EngineModel(BaseModel):
    model: str = Field(examples=["homelab:v3"])
    phase: Phase | Literal["loaded"]
    progress: float | None = Field(description="Progress of this phase, from 0 to 1. Null: unknown.")
    seconds: float | None = Field(description="Seconds since the first request for it. Null: loaded.")
    bytes: int | None = Field(description="Bytes of memory. Null: not known yet.")
    context: int | None = Field(description="Size of the context in tokens. Null: not known yet.")
    requests: int | None = Field(description="Requests that use it or wait for it. Null: not loaded yet.")
    leaves_at: UtcTime | None = Field(
        description="When it is unloaded, unless it is used. Null: when its memory is needed."
    )


class EngineModels(BaseModel):
    models: list[EngineModel]


@router.get("")
async def show_engines(request: Request, caller: CurrentCaller) -> EngineModels:
    """List the models in memory that you may use, and the progress of those that are being loaded."""
    engine, models = get_engine(request), get_models(request)
    loading = [
        EngineModel(
            model=model.reference,
            phase=model.phase,
            progress=model.progress,
            seconds=model.seconds,
            bytes=model.bytes,
            context=None,
            requests=None,
            leaves_at=None,
        )
        for model in await engine.loading()
        if await models.can_use(model.reference, caller)
    ]
    loaded = [
        EngineModel(
            model=loaded_model.reference,
            phase="loaded",
            progress=1.0,
            seconds=None,
            bytes=loaded_model.bytes,
            context=loaded_model.context,
            requests=loaded_model.users,
            leaves_at=loaded_model.leaves_at,
        )
        for loaded_model in await engine.loaded()
        if await models.can_use(loaded_model.reference, caller)
    ]
    return EngineModels(models=loading + loaded)
