"""The routes /v1/models of OpenAI's API, and /models, a short list of the served models."""

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, Field

from cluster.db import get_database
from cluster.ownership import Principal
from cluster.times import UtcTime
from jobs.states import State
from jobs.tables import Job
from pipelines.training.models import tiny
from pipelines.training.models.versions import Model
from serve.engines.protocol import OllamaModel
from serve.models import fine_tuned_names
from serve.models.dependencies import get_models
from serve.models.names import delete_and_unload, latest_name, newest_name, served_versions
from serve.models.resolver import configured_folders
from serve.security.callers import CurrentCaller

router = APIRouter(prefix="/v1")
summary_router = APIRouter()

DEFAULT_OWNER = "forgearr"
MAX_FINE_TUNED = 1000


class ModelCard(BaseModel):
    id: str = Field(examples=["homelab:latest"])
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time. 0: the model is part of Forgearr, or named in the settings.")
    owned_by: str = DEFAULT_OWNER


class ModelCards(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ModelDeleted(BaseModel):
    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


class ModelSummary(BaseModel):
    name: str = Field(examples=["homelab:latest"])
    size: int = Field(description="Bytes of the model's file.")
    modified_at: UtcTime


class ModelSummaries(BaseModel):
    models: list[ModelSummary]
    active_model: str | None = Field(description="The newest of the served models.")


@router.get("/models")
async def list_models(request: Request, caller: CurrentCaller) -> ModelCards:
    """List the models that requests can name. Of private models only your own are listed."""
    models = await get_models(request).list_registered(caller)
    cards = [card for model in models for card in _model_cards(model)]
    folder_cards = [_card(name, folder.created_at) for name, folder in configured_folders().items()]
    remote_cards = [_remote_card(model) for model in await get_models(request).list_remote(caller)]
    return ModelCards(
        data=[*cards, *folder_cards, _tiny_card(), *await _fine_tuned_cards(models, caller), *remote_cards]
    )


@router.get("/models/{model:path}")
async def show_model(
    request: Request, model: Annotated[str, Path(min_length=1, max_length=400)], caller: CurrentCaller
) -> ModelCard:
    """Get one model."""
    resolved = await get_models(request).resolve(model, caller)
    if isinstance(resolved.source, OllamaModel):
        return _remote_card(resolved.source)
    return _tiny_card() if resolved.source is None else _card(model, resolved.source.created_at)


@router.delete("/models/{model:path}")
async def delete_model(
    request: Request, model: Annotated[str, Path(min_length=1, max_length=400)], caller: CurrentCaller
) -> ModelDeleted:
    """Delete a version (NAME:v3, or ft:…), or a model with all its versions (NAME, NAME:latest).

    What is served is deleted by nobody. Administrators may delete everything else, others what is theirs.
    """
    await delete_and_unload(request, model, caller)
    return ModelDeleted(id=model)


@summary_router.get("/models")
async def summarize_models(request: Request, caller: CurrentCaller) -> ModelSummaries:
    """List the served models in short form."""
    served = await served_versions(request, caller)
    return ModelSummaries(
        models=[
            ModelSummary(name=latest_name(version), size=version.file.bytes, modified_at=version.created_at)
            for version in served
        ],
        active_model=newest_name(served),
    )


def _model_cards(model: Model) -> list[ModelCard]:
    latest = [_card(latest_name(model.served), model.served.created_at)] if model.served else []
    return latest + [_card(version.reference, version.created_at) for version in model.versions]


async def _fine_tuned_cards(models: list[Model], principal: Principal) -> list[ModelCard]:
    """The fine-tuned models, the newest first, without exported versions that were deleted since."""
    versions = {(version.name, version.number) for model in models for version in model.versions}
    query = fine_tuned_names.fine_tuning_jobs(principal).where(Job.state == State.SUCCEEDED)
    async with get_database().read_transaction() as session:
        jobs = list(await session.scalars(query.order_by(Job.created_at.desc()).limit(MAX_FINE_TUNED)))
    return [
        _card(fine_tuned_names.model_name(job), job.finished_at or job.created_at, fine_tuned_names.organization(job))
        for job in jobs
        if (version := fine_tuned_names.version_of(job)) is None or version in versions
    ]


def _card(reference: str, created_at: datetime, owner: str = DEFAULT_OWNER) -> ModelCard:
    return ModelCard(id=reference, created=int(created_at.timestamp()), owned_by=owner)


def _remote_card(model: OllamaModel) -> ModelCard:
    return ModelCard(id=model.name, created=int(model.created_at.timestamp()), owned_by="ollama")


def _tiny_card() -> ModelCard:
    return ModelCard(id=tiny.NAME, created=0)
