"""/v1/embeddings, as OpenAI has it, and /api/embed and /api/embeddings, as Ollama has them."""

from time import perf_counter_ns
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from serve.answering import engine_of, models_of, while_connected
from serve.api.jobs import owner_of
from serve.api.ollama import keep
from serve.auth import Caller, CurrentCaller
from serve.bodies.chat import ModelReference, Strict
from serve.bodies.ollama import KeepAlive
from serve.embedding import as_base64, embed
from serve.engines.protocol import Embedded, Engine
from serve.envelope import ERROR_RESPONSES, OPENAI_ERROR_RESPONSES
from serve.models import Meant

openai = APIRouter(prefix="/v1", tags=["Chat"], responses=OPENAI_ERROR_RESPONSES)
ollama = APIRouter(prefix="/api", tags=["Ollama"], responses=ERROR_RESPONSES)
router = APIRouter()

MOST_TEXTS = 2048
"""OpenAI's limit."""
Text = Annotated[str, Field(min_length=1)]
Texts = Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_TEXTS)]


class EmbeddingRequest(Strict):
    model: ModelReference
    input: Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, ge=1, le=100_000, description="The first so many, made to length 1.")
    user: str | None = Field(default=None, description="Not used.")


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="Base64 of little-endian floats of 4 bytes, where that is asked.")


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


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


@openai.post("/embeddings", response_model=Embeddings)
async def create_embeddings(request: Request, wanted: EmbeddingRequest, caller: CurrentCaller) -> Any:
    """Texts as numbers: what is alike in meaning is close by."""
    meant = await models_of(request).resolve(wanted.model, owner_of(caller))
    told = await while_connected(request, answer_embeddings(engine_of(request), meant, wanted))
    return Response(orjson.dumps(told), media_type="application/json")


async def answer_embeddings(engine: Engine, meant: Meant, wanted: EmbeddingRequest) -> dict[str, Any]:
    texts = _texts(wanted.input)
    found = await embed(engine, meant.reference, texts, meant.source, dimensions=wanted.dimensions)
    packed = [as_base64(vector) if wanted.encoding_format == "base64" else vector for vector in found.vectors]
    return {
        "object": "list",
        "model": wanted.model,
        "data": [{"object": "embedding", "index": index, "embedding": one} for index, one in enumerate(packed)],
        "usage": {"prompt_tokens": found.tokens, "total_tokens": found.tokens},
    }


@ollama.post("/embed")
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


@ollama.post("/embeddings")
async def create_ollama_embedding(
    request: Request, wanted: OllamaEmbeddingsRequest, caller: CurrentCaller
) -> OllamaEmbeddings:
    """The older way of it, for a single text."""
    found = await _found(request, caller, wanted.model, wanted.prompt, truncate=True)
    await _keep(request, caller, wanted)
    return OllamaEmbeddings(embedding=found.vectors[0])


router.include_router(openai)
router.include_router(ollama)


async def _keep(request: Request, caller: Caller, wanted: OllamaAsked) -> None:
    meant = await models_of(request).resolve(wanted.model, owner_of(caller))
    await keep(engine_of(request), meant, wanted.keep_alive)


async def _found(request: Request, caller: Caller, model: str, texts: str | list[str], **options: Any) -> Embedded:
    meant = await models_of(request).resolve(model, owner_of(caller))
    work = embed(engine_of(request), meant.reference, _texts(texts), meant.source, **options)
    return await while_connected(request, work)


def _texts(wanted: str | list[str]) -> list[str]:
    return [wanted] if isinstance(wanted, str) else wanted
