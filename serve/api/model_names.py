"""/v1/models, as OpenAI has it, and /models: the names under which models can be asked."""

from contextlib import suppress
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, Field

from cluster.db import get_database
from cluster.errors import InvalidRequest, Unavailable
from cluster.times import UtcTime
from jobs.queue import Owner
from jobs.states import State
from jobs.tables import Job
from pipelines.training import removal, tiny
from pipelines.training.registry import Model, Version
from serve import fine_tuned
from serve.answering import engine_of, models_of
from serve.api.jobs import owner_of
from serve.auth import Caller, CurrentCaller
from serve.engines.protocol import Folder, Remote
from serve.envelope import ERROR_RESPONSES, OPENAI_ERROR_RESPONSES
from serve.models import folders

openai = APIRouter(prefix="/v1", tags=["Models"], responses=OPENAI_ERROR_RESPONSES)
native = APIRouter(tags=["Models"], responses=ERROR_RESPONSES)
router = APIRouter()

OWNER = "forgearr"
MOST_TUNED = 1000


class NotRegistered(InvalidRequest):
    """This model is no version of the registry."""

    code = "NOT_REGISTERED"


class ModelCard(BaseModel):
    id: str = Field(examples=["homelab:latest"])
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time. 0: it comes with Forgearr, or the settings name it.")
    owned_by: str = OWNER


class ModelCards(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ModelDeleted(BaseModel):
    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


class ModelSummary(BaseModel):
    name: str = Field(examples=["homelab:latest"])
    size: int = Field(description="Bytes of the file that is served.")
    modified_at: UtcTime


class ModelSummaries(BaseModel):
    models: list[ModelSummary]
    active_model: str | None = Field(description="The newest of those that are served.")


@openai.get("/models")
async def list_models(request: Request, caller: CurrentCaller) -> ModelCards:
    """Every name under which a model can be asked; of the fine-tuned ones (ft:…) your own."""
    models = await models_of(request).all()
    cards = [card for model in models for card in _cards(model)]
    named = [_card(name, folder.created_at) for name, folder in folders().items()]
    remote = [_remote(model) for model in await models_of(request).remote()]
    return ModelCards(data=[*cards, *named, _tiny(), *await _tuned(models, owner_of(caller)), *remote])


@openai.get("/models/{model:path}")
async def show_model(
    request: Request, model: Annotated[str, Path(min_length=1, max_length=400)], caller: CurrentCaller
) -> ModelCard:
    """One of them."""
    meant = await models_of(request).resolve(model, owner_of(caller))
    if isinstance(meant.source, Remote):
        return _remote(meant.source)
    return _tiny() if meant.source is None else _card(model, meant.source.created_at)


@openai.delete("/models/{model:path}")
async def delete_model(
    request: Request, model: Annotated[str, Path(min_length=1, max_length=400)], caller: CurrentCaller
) -> ModelDeleted:
    """Delete a version (NAME:v3, or ft:…), or a model with all its versions (NAME, NAME:latest): one's own, or any as
    an administrator."""
    await delete(request, model, caller)
    return ModelDeleted(id=model)


@native.get("/models")
async def summarize_models(request: Request, caller: CurrentCaller) -> ModelSummaries:
    """What is served, in short."""
    served = await _served(request)
    return ModelSummaries(
        models=[
            ModelSummary(name=_latest(version), size=version.file.bytes, modified_at=version.created_at)
            for version in served
        ],
        active_model=_newest(served),
    )


router.include_router(openai)
router.include_router(native)


async def active_model(request: Request) -> str | None:
    """The newest model that is served; None: there is none, or nobody can say."""
    try:
        return _newest(await _served(request))
    except Unavailable:
        return None


async def delete(request: Request, reference: str, caller: Caller) -> None:
    """Delete models, and let them go from memory when the last requests that use them are answered."""
    owner = owner_of(caller)
    if reference.startswith(fine_tuned.PREFIX):
        meant = await models_of(request).resolve(reference, owner)
        if isinstance(meant.source, Folder):
            raise NotRegistered(f"'{reference}' was never exported, so there is no model to delete.")
        reference = meant.reference
    gone = await removal.remove(reference, owner)
    models_of(request).forget()
    for version in gone:
        with suppress(Unavailable):  # what is not reachable now makes room as soon as others need it
            await engine_of(request).unload(version.reference, version)


async def _served(request: Request) -> list[Version]:
    return [model.served for model in await models_of(request).all() if model.served is not None]


def _newest(served: list[Version]) -> str | None:
    newest = max(served, key=lambda version: version.created_at, default=None)
    return _latest(newest) if newest else None


def _cards(model: Model) -> list[ModelCard]:
    latest = [_card(_latest(model.served), model.served.created_at)] if model.served else []
    return latest + [_card(version.reference, version.created_at) for version in model.versions]


async def _tuned(models: list[Model], owner: Owner) -> list[ModelCard]:
    """What has been fine-tuned, the newest first; without what was exported and has been deleted since."""
    versions = {(version.name, version.number) for model in models for version in model.versions}
    done = fine_tuned.trainings(owner).where(Job.state == State.SUCCEEDED)
    async with get_database().reading() as session:
        jobs = list(await session.scalars(done.order_by(Job.created_at.desc()).limit(MOST_TUNED)))
    return [
        _card(fine_tuned.name(job), job.finished_at or job.created_at, fine_tuned.organization(job))
        for job in jobs
        if (version := fine_tuned.version_of(job)) is None or version in versions
    ]


def _card(reference: str, created_at: datetime, owner: str = OWNER) -> ModelCard:
    return ModelCard(id=reference, created=int(created_at.timestamp()), owned_by=owner)


def _remote(model: Remote) -> ModelCard:
    return ModelCard(id=model.name, created=int(model.created_at.timestamp()), owned_by="ollama")


def _tiny() -> ModelCard:
    return ModelCard(id=tiny.NAME, created=0)


def _latest(version: Version) -> str:
    return f"{version.name}:latest"
