"""/api/v1/engines: what the engines hold, and what is on its way there."""

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from cluster.times import UtcTime
from serve.engines.protocol import Phase
from serve.http.errors import ERROR_RESPONSES
from serve.models.dependencies import get_engine
from serve.security.callers import CurrentCaller

router = APIRouter(prefix="/api/v1/engines", tags=["Models"], responses=ERROR_RESPONSES)


class EngineModel(BaseModel):
    model: str = Field(examples=["homelab:v3"])
    phase: Phase | Literal["loaded"]
    progress: float | None = Field(description="Which part of this phase is done, from 0 to 1. Null: nobody knows.")
    seconds: float | None = Field(description="Since somebody asked for it, while it is not there yet.")
    bytes: int | None = Field(description="What it takes in memory. Null: not known yet.")
    context: int | None = Field(description="How many tokens a conversation may have. Null: not known yet.")
    requests: int | None = Field(description="How many it answers, or wait for it. Null: it is not there yet.")
    leaves_at: UtcTime | None = Field(description="Unless it is used again. Null: when its memory is needed.")


class EngineModels(BaseModel):
    models: list[EngineModel]


@router.get("")
async def show_engines(request: Request, caller: CurrentCaller) -> EngineModels:
    """The models in memory, and how far those are that are being loaded."""
    engine = get_engine(request)
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
    ]
    return EngineModels(models=loading + loaded)
