"""The route /v1/embeddings of OpenAI's API."""

from typing import Any, Literal

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from serve.engines.protocol import Engine
from serve.http.disconnect import cancel_on_disconnect
from serve.http.schemas import StrictModel
from serve.models.dependencies import get_engine, get_models
from serve.models.embed import Texts, as_base64, embed, texts_of
from serve.models.resolver import ResolvedModel
from serve.openai.chat_schemas import ModelReference
from serve.security.callers import CurrentCaller

router = APIRouter(prefix="/v1")


class EmbeddingRequest(StrictModel):
    model: ModelReference
    input: Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(
        default=None, ge=1, le=100_000, description="Size of the vectors, which are truncated and normalized again."
    )
    user: str | None = Field(default=None, description="Not used.")


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="With base64: little-endian floats of 4 bytes.")


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


@router.post("/embeddings", response_model=Embeddings)
async def create_embeddings(request: Request, body: EmbeddingRequest, caller: CurrentCaller) -> Any:
    """Create an embedding of each text: texts of similar meaning have similar vectors."""
    model = await get_models(request).resolve(body.model, caller)
    response = await cancel_on_disconnect(request, compute_embeddings(get_engine(request), model, body))
    return Response(orjson.dumps(response), media_type="application/json")


async def compute_embeddings(engine: Engine, model: ResolvedModel, body: EmbeddingRequest) -> dict[str, Any]:
    texts = texts_of(body.input)
    result = await embed(engine, model, texts, dimensions=body.dimensions)
    encoded = [as_base64(vector) if body.encoding_format == "base64" else vector for vector in result.vectors]
    return {
        "object": "list",
        "model": body.model,
        "data": [
            {"object": "embedding", "index": index, "embedding": embedding} for index, embedding in enumerate(encoded)
        ],
        "usage": {"prompt_tokens": result.tokens, "total_tokens": result.tokens},
    }
