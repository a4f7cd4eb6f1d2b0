"""/api/tags, /api/show, /api/ps and /api/version: what models there are, as Ollama tells it."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from cluster.times import UtcTime
from pipelines.training.models.versions import Manner, Version
from serve.engines.gguf import tiny as gguf_tiny
from serve.engines.model_header import Header
from serve.engines.protocol import Folder, Remote, Source
from serve.http.disconnect import while_connected
from serve.models.dependencies import engine_of, models_of
from serve.monitoring.version import VERSION
from serve.ollama.modelfile import as_text, modelfile
from serve.openai.chat_schemas import ModelReference
from serve.security.callers import CurrentCaller, owner_of

router = APIRouter(prefix="/api", tags=["Ollama"])

NEVER = datetime(2318, 1, 1, tzinfo=UTC)
"""What Ollama says of a model that stays: it leaves only when another one needs its memory."""


class Details(BaseModel):
    format: str = "gguf"
    parent_model: str = Field(description="What it was trained from.")
    quantization_level: str


class Tag(BaseModel):
    name: str = Field(examples=["homelab:latest"])
    model: str
    modified_at: UtcTime
    size: int = Field(description="Bytes of its file.")
    digest: str = Field(description="SHA-256 of its file.")
    details: Details


class Tags(BaseModel):
    models: list[Tag]


class Running(BaseModel):
    name: str
    model: str
    size: int = Field(description="Bytes of memory.")
    expires_at: UtcTime
    context_length: int
    digest: str
    details: Details | None


class Runnings(BaseModel):
    models: list[Running]


class ShowRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: ModelReference = Field(validation_alias=AliasChoices("model", "name"))
    verbose: bool | None = Field(default=None, description="Not used.")


class ShownDetails(Details):
    family: str
    families: list[str]
    parameter_size: str = Field(examples=["2.9M"])


class Shown(BaseModel):
    modified_at: UtcTime | None = Field(description="Null: it comes with Forgearr.")
    modelfile: str
    template: str = Field(description="Of conversations, in Jinja: its own, or that of its file.")
    system: str
    parameters: str = Field(description="Its own, a line each.")
    messages: list[dict[str, Any]] = Field(description="How every conversation begins.")
    license: str
    details: ShownDetails
    model_info: dict[str, str | int]
    capabilities: list[str]


class VersionView(BaseModel):
    version: str


@router.get("/tags")
async def list_tags(request: Request, caller: CurrentCaller) -> Tags:
    """Every registered model, under each of its names."""
    models = await models_of(request).all()
    latest = [_tag(f"{model.name}:latest", model.served) for model in models if model.served]
    versions = [_tag(version.reference, version) for model in models for version in model.versions]
    remote = [
        Tag(
            name=model.name,
            model=model.name,
            modified_at=model.created_at,
            size=model.bytes,
            digest=model.digest,
            details=_details(model),
        )
        for model in await models_of(request).remote()
    ]
    return Tags(models=[*latest, *versions, *remote])


@router.post("/show")
async def show(request: Request, wanted: ShowRequest, caller: CurrentCaller) -> Shown:
    """What a model's file says of it."""
    meant = await models_of(request).resolve(wanted.model, owner_of(caller))
    header = await while_connected(request, engine_of(request).describe(meant.reference, meant.source))
    source = meant.source
    family = header.architecture
    manner = source.manner if isinstance(source, Version) else Manner()
    template = manner.template or header.template
    return Shown(
        modified_at=source.created_at if source else None,
        modelfile=modelfile(meant.reference, template, manner),
        template=template,
        system=manner.system,
        parameters=as_text(manner.parameters),
        messages=manner.messages,
        license="\n".join(manner.license),
        details=ShownDetails(
            **_details(source).model_dump(), family=family, families=[family], parameter_size=_short(header.parameters)
        ),
        model_info={
            "general.architecture": family,
            "general.parameter_count": header.parameters,
            f"{family}.block_count": header.layers,
            f"{family}.context_length": header.context,
            f"{family}.embedding_length": header.width,
        },
        capabilities=list(_capabilities(header, template)),
    )


@router.get("/ps")
async def list_running(request: Request, caller: CurrentCaller) -> Runnings:
    """The models in memory."""
    versions = {version.reference: version for model in await models_of(request).all() for version in model.versions}
    return Runnings(
        models=[
            Running(
                name=_name(held.reference),
                model=_name(held.reference),
                size=held.bytes,
                expires_at=held.leaves_at or NEVER,
                context_length=held.context,
                digest=version.file.sha256 if (version := versions.get(held.reference)) else "",
                details=_details(version) if version else None,
            )
            for held in await engine_of(request).loaded()
        ]
    )


@router.get("/version")
async def show_version(caller: CurrentCaller) -> VersionView:
    """Forgearr's version, since it is Forgearr that answers."""
    return VersionView(version=VERSION)


def _tag(name: str, version: Version) -> Tag:
    file = version.file
    return Tag(
        name=name,
        model=name,
        modified_at=version.created_at,
        size=file.bytes,
        digest=file.sha256,
        details=_details(version),
    )


def _details(source: Source) -> Details:
    if isinstance(source, Folder):
        return Details(format="safetensors", parent_model=source.base_model, quantization_level="unknown")
    if isinstance(source, Remote):
        return Details(parent_model=source.base_model, quantization_level=source.quantization)
    if source is None:
        return Details(parent_model="", quantization_level=gguf_tiny.QUANTIZATION.upper())
    parent = source.parent or source.base_model
    return Details(parent_model=parent, quantization_level=source.file.quantization.upper())


def _name(reference: str) -> str:
    """Ollama's names always have a tag."""
    return reference if ":" in reference else f"{reference}:latest"


def _capabilities(header: Header, template: str) -> Iterator[str]:
    """What a model was made for, as far as its file tells."""
    if header.pools:
        yield "embedding"
        return
    yield "completion"
    if "tools" in template:
        yield "tools"
    if "enable_thinking" in template:
        yield "thinking"


def _short(count: int) -> str:
    """135.2M, 8.0B."""
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
