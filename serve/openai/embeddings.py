"""/v1/embeddings, as OpenAI has it."""

from typing import Any, Literal

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from serve.engines.protocol import Engine
from serve.http.disconnect import while_connected
from serve.http.errors import OPENAI_ERROR_RESPONSES
from serve.http.schemas import Strict
from serve.models.dependencies import engine_of, models_of
from serve.models.embed import Texts, as_base64, embed, texts_of
from serve.models.resolver import Meant
from serve.openai.chat_schemas import ModelReference
from serve.security.callers import CurrentCaller, owner_of

router = APIRouter(prefix="/v1", tags=["Chat"], responses=OPENAI_ERROR_RESPONSES)


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


@router.post("/embeddings", response_model=Embeddings)
async def create_embeddings(request: Request, wanted: EmbeddingRequest, caller: CurrentCaller) -> Any:
    """Texts as numbers: what is alike in meaning is close by."""
    meant = await models_of(request).resolve(wanted.model, owner_of(caller))
    told = await while_connected(request, answer_embeddings(engine_of(request), meant, wanted))
    return Response(orjson.dumps(told), media_type="application/json")


async def answer_embeddings(engine: Engine, meant: Meant, wanted: EmbeddingRequest) -> dict[str, Any]:
    texts = texts_of(wanted.input)
    found = await embed(engine, meant.reference, texts, meant.source, dimensions=wanted.dimensions)
    packed = [as_base64(vector) if wanted.encoding_format == "base64" else vector for vector in found.vectors]
    return {
        "object": "list",
        "model": wanted.model,
        "data": [{"object": "embedding", "index": index, "embedding": one} for index, one in enumerate(packed)],
        "usage": {"prompt_tokens": found.tokens, "total_tokens": found.tokens},
    }
