"""The routes of Ollama's API that list and describe models: /api/tags, /api/show, /api/ps; and /api/version."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from cluster.times import UtcTime
from pipelines.training.models.versions import ModelDefaults, Version
from serve.engines.gguf import tiny as gguf_tiny
from serve.engines.model_header import Header
from serve.engines.protocol import ModelFolder, OllamaModel, Source
from serve.http.disconnect import cancel_on_disconnect
from serve.models.dependencies import get_engine, get_models
from serve.monitoring.version import VERSION
from serve.ollama.modelfile import format_parameters, modelfile
from serve.openai.chat_schemas import ModelReference
from serve.security.callers import CurrentCaller

router = APIRouter(prefix="/api")

NEVER_EXPIRES = datetime(2318, 1, 1, tzinfo=UTC)
"""Ollama's value for a model without a limit of time, which is unloaded only when its memory is needed."""


class ModelDetails(BaseModel):
    format: str = "gguf"
    parent_model: str = Field(description="The base model.")
    quantization_level: str


class Tag(BaseModel):
    name: str = Field(examples=["homelab:latest"])
    model: str
    modified_at: UtcTime
    size: int = Field(description="Bytes of the file.")
    digest: str = Field(description="SHA-256 of the file.")
    details: ModelDetails


class Tags(BaseModel):
    models: list[Tag]


class RunningModel(BaseModel):
    name: str
    model: str
    size: int = Field(description="Bytes of memory.")
    expires_at: UtcTime
    context_length: int
    digest: str
    details: ModelDetails | None


class RunningModels(BaseModel):
    models: list[RunningModel]


class ShowRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: ModelReference = Field(validation_alias=AliasChoices("model", "name"))
    verbose: bool | None = Field(default=None, description="Not used.")


class ShowDetails(ModelDetails):
    family: str
    families: list[str]
    parameter_size: str = Field(examples=["2.9M"])


class ShowResponse(BaseModel):
    modified_at: UtcTime | None = Field(description="Null: the model is part of Forgearr.")
    modelfile: str
    template: str = Field(description="Chat template in Jinja: the model's own, or that of its file.")
    system: str
    parameters: str = Field(description="The model's own, one on each line.")
    messages: list[dict[str, Any]] = Field(description="First messages of every chat.")
    license: str
    details: ShowDetails
    model_info: dict[str, str | int]
    capabilities: list[str]


class VersionView(BaseModel):
    version: str


@router.get("/tags")
async def list_tags(request: Request, caller: CurrentCaller) -> Tags:
    """List the registered models, under each of their names, and the models of the configured Ollama server."""
    models = await get_models(request).list_registered(caller)
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
        for model in await get_models(request).list_remote(caller)
    ]
    return Tags(models=[*latest, *versions, *remote])


@router.post("/show")
async def show(request: Request, body: ShowRequest, caller: CurrentCaller) -> ShowResponse:
    """Get the details of a model."""
    model = await get_models(request).resolve(body.model, caller)
    header = await cancel_on_disconnect(request, get_engine(request).describe(model.reference, model.source))
    source = model.source
    family = header.architecture
    defaults = source.defaults if isinstance(source, Version) else ModelDefaults()
    template = defaults.template or header.template
    return ShowResponse(
        modified_at=source.created_at if source else None,
        modelfile=modelfile(model.reference, template, defaults),
        template=template,
        system=defaults.system,
        parameters=format_parameters(defaults.parameters),
        messages=defaults.messages,
        license="\n".join(defaults.license),
        details=ShowDetails(
            **_details(source).model_dump(),
            family=family,
            families=[family],
            parameter_size=_format_count(header.parameters),
        ),
        model_info={
            "general.architecture": family,
            "general.parameter_count": header.parameters,
            f"{family}.block_count": header.layers,
            f"{family}.context_length": header.context,
            f"{family}.embedding_length": header.hidden_size,
        },
        capabilities=list(_capabilities(header, template)),
    )


@router.get("/ps")
async def list_running(request: Request, caller: CurrentCaller) -> RunningModels:
    """List the models in memory that you may use."""
    versions = {
        version.reference: version
        for model in await get_models(request).list_registered(caller)
        for version in model.versions
    }
    return RunningModels(
        models=[
            RunningModel(
                name=_name_with_tag(loaded.reference),
                model=_name_with_tag(loaded.reference),
                size=loaded.bytes,
                expires_at=loaded.leaves_at or NEVER_EXPIRES,
                context_length=loaded.context,
                digest=version.file.sha256 if (version := versions.get(loaded.reference)) else "",
                details=_details(version) if version else None,
            )
            for loaded in await get_engine(request).loaded()
            if await get_models(request).can_use(loaded.reference, caller)
        ]
    )


@router.get("/version")
async def show_version(caller: CurrentCaller) -> VersionView:
    """Get the version of Forgearr."""
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


def _details(source: Source) -> ModelDetails:
    if isinstance(source, ModelFolder):
        return ModelDetails(format="safetensors", parent_model=source.base_model, quantization_level="unknown")
    if isinstance(source, OllamaModel):
        return ModelDetails(parent_model=source.base_model, quantization_level=source.quantization)
    if source is None:
        return ModelDetails(parent_model="", quantization_level=gguf_tiny.QUANTIZATION.upper())
    parent = source.parent or source.base_model
    return ModelDetails(parent_model=parent, quantization_level=source.file.quantization.upper())


def _name_with_tag(reference: str) -> str:
    """In Ollama's API every name has a tag."""
    return reference if ":" in reference else f"{reference}:latest"


def _capabilities(header: Header, template: str) -> Iterator[str]:
    """The capabilities of a model, as far as its header and its template show them."""
    if header.has_pooling:
        yield "embedding"
        return
    yield "completion"
    if "tools" in template:
        yield "tools"
    if "enable_thinking" in template:
        yield "thinking"


def _format_count(count: int) -> str:
    """Such as 135.2M or 8.0B."""
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
