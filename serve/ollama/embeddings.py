"""Ollama's embedding routes."""

from time import perf_counter_ns
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from serve.engines.protocol import Embedded
from serve.http.disconnect import while_connected
from serve.http.errors import ERROR_RESPONSES
from serve.models.dependencies import engine_of, models_of
from serve.models.embed import Text, Texts, embed, texts_of
from serve.ollama.keep_alive import keep
from serve.ollama.schemas import KeepAlive
from serve.openai.chat_schemas import ModelReference
from serve.security.callers import Caller, CurrentCaller, owner_of

router = APIRouter(prefix="/api", tags=["Ollama"], responses=ERROR_RESPONSES)


class OllamaAsked(BaseModel):
    """Options concern how a model is loaded and answers: none of them changes an embedding."""

    model_config = ConfigDict(extra="forbid")

    model: ModelReference
    options: dict[str, Any] | None = Field(default=None, description="Not used.")
    keep_alive: KeepAlive = None


class OllamaEmbedRequest(OllamaAsked):
    input: Texts
    truncate: bool | None = Field(default=None, description="False: refuse texts that are too long.")
    dimensions: int | None = Field(default=None, ge=1, le=100_000)


class OllamaEmbeddingsRequest(OllamaAsked):
    prompt: Text


class OllamaEmbed(BaseModel):
    model: str
    embeddings: list[list[float]]
    total_duration: int
    prompt_eval_count: int


class OllamaEmbeddings(BaseModel):
    embedding: list[float]


@router.post("/embed")
async def create_ollama_embeddings(request: Request, wanted: OllamaEmbedRequest, caller: CurrentCaller) -> OllamaEmbed:
    """The same as Ollama has it; what is too long is cut unless `truncate` is false."""
    began = perf_counter_ns()
    found = await _found(
        request, caller, wanted.model, wanted.input, dimensions=wanted.dimensions, truncate=wanted.truncate is not False
    )
    await _keep(request, caller, wanted)
    return OllamaEmbed(
        model=wanted.model,
        embeddings=found.vectors,
        total_duration=perf_counter_ns() - began,
        prompt_eval_count=found.tokens,
    )


@router.post("/embeddings")
async def create_ollama_embedding(
    request: Request, wanted: OllamaEmbeddingsRequest, caller: CurrentCaller
) -> OllamaEmbeddings:
    """The older way of it, for a single text."""
    found = await _found(request, caller, wanted.model, wanted.prompt, truncate=True)
    await _keep(request, caller, wanted)
    return OllamaEmbeddings(embedding=found.vectors[0])


async def _keep(request: Request, caller: Caller, wanted: OllamaAsked) -> None:
    meant = await models_of(request).resolve(wanted.model, owner_of(caller))
    await keep(engine_of(request), meant, wanted.keep_alive)


async def _found(request: Request, caller: Caller, model: str, texts: str | list[str], **options: Any) -> Embedded:
    meant = await models_of(request).resolve(model, owner_of(caller))
    work = embed(engine_of(request), meant.reference, texts_of(texts), meant.source, **options)
    return await while_connected(request, work)
