"""The routes /api/embed and /api/embeddings of Ollama's API."""

from time import perf_counter_ns
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from cluster.ownership import Principal
from serve.engines.protocol import EmbeddingResult
from serve.http.disconnect import cancel_on_disconnect
from serve.models.dependencies import get_engine, get_models
from serve.models.embed import Text, Texts, embed, texts_of
from serve.ollama.keep_alive import apply_keep_alive
from serve.ollama.schemas import KeepAlive
from serve.openai.chat_schemas import ModelReference
from serve.security.callers import CurrentCaller

router = APIRouter(prefix="/api")


class BaseOllamaEmbedRequest(BaseModel):
    """Accepts options without effect: they concern loading and sampling, and change no embedding."""

    model_config = ConfigDict(extra="forbid")

    model: ModelReference
    options: dict[str, Any] | None = Field(default=None, description="Not used.")
    keep_alive: KeepAlive = None


class OllamaEmbedRequest(BaseOllamaEmbedRequest):
    input: Texts
    truncate: bool | None = Field(
        default=None, description="false: a text that is too long is an error. Otherwise it is truncated."
    )
    dimensions: int | None = Field(default=None, ge=1, le=100_000)


class OllamaEmbeddingsRequest(BaseOllamaEmbedRequest):
    prompt: Text


class OllamaEmbedResponse(BaseModel):
    model: str
    embeddings: list[list[float]]
    total_duration: int
    prompt_eval_count: int


class OllamaEmbeddingsResponse(BaseModel):
    embedding: list[float]


@router.post("/embed")
async def create_ollama_embeddings(
    request: Request, body: OllamaEmbedRequest, caller: CurrentCaller
) -> OllamaEmbedResponse:
    """Create an embedding of each text."""
    started_at = perf_counter_ns()
    result = await _embed(
        request, caller, body.model, body.input, dimensions=body.dimensions, truncate=body.truncate is not False
    )
    await _apply_keep_alive(request, caller, body)
    return OllamaEmbedResponse(
        model=body.model,
        embeddings=result.vectors,
        total_duration=perf_counter_ns() - started_at,
        prompt_eval_count=result.tokens,
    )


@router.post("/embeddings")
async def create_ollama_embedding(
    request: Request, body: OllamaEmbeddingsRequest, caller: CurrentCaller
) -> OllamaEmbeddingsResponse:
    """Create an embedding of one text. Newer clients use /api/embed."""
    result = await _embed(request, caller, body.model, body.prompt, truncate=True)
    await _apply_keep_alive(request, caller, body)
    return OllamaEmbeddingsResponse(embedding=result.vectors[0])


async def _apply_keep_alive(request: Request, caller: Principal, body: BaseOllamaEmbedRequest) -> None:
    model = await get_models(request).resolve(body.model, caller)
    await apply_keep_alive(get_engine(request), model, body.keep_alive, caller)


async def _embed(
    request: Request, caller: Principal, model: str, texts: str | list[str], **options: Any
) -> EmbeddingResult:
    resolved = await get_models(request).resolve(model, caller)
    awaitable = embed(get_engine(request), resolved, texts_of(texts), **options)
    return await cancel_on_disconnect(request, awaitable)
