"""The route /v1/rerank, compatible with Jina's API and llama.cpp: sorts texts by their relevance to a query."""

from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from serve.http.disconnect import cancel_on_disconnect
from serve.http.schemas import StrictModel
from serve.models.dependencies import get_engine, get_models
from serve.models.embed import Text
from serve.openai.chat_schemas import ModelReference
from serve.openai.embeddings import EmbeddingUsage
from serve.security.callers import CurrentCaller

router = APIRouter(prefix="/v1")

MAX_DOCUMENTS = 1000


class RerankRequest(StrictModel):
    model: ModelReference
    query: Text
    documents: Annotated[list[Text], Field(min_length=1, max_length=MAX_DOCUMENTS)]
    top_n: int | None = Field(default=None, ge=1, description="Number of best documents to return. Null: all.")
    return_documents: bool | None = Field(default=None, description="Null: false.")


class RankedDocument(BaseModel):
    index: int = Field(description="Position in `documents`.")
    relevance_score: float
    document: str | None


class RerankResponse(BaseModel):
    object: Literal["list"] = "list"
    model: str
    results: list[RankedDocument] = Field(description="The best first.")
    usage: EmbeddingUsage


@router.post("/rerank")
async def rerank(request: Request, body: RerankRequest, caller: CurrentCaller) -> RerankResponse:
    """Sort documents by their relevance to a query. The model must be a reranker."""
    model = await get_models(request).resolve(body.model, caller)
    awaitable = get_engine(request).rank(model.reference, body.query, body.documents, model.source, model.account)
    ranked = await cancel_on_disconnect(request, awaitable)
    best = sorted(enumerate(ranked.scores), key=lambda pair: -pair[1])[: body.top_n]
    results = [
        RankedDocument(
            index=index,
            relevance_score=score,
            document=body.documents[index] if body.return_documents else None,
        )
        for index, score in best
    ]
    usage = EmbeddingUsage(prompt_tokens=ranked.tokens, total_tokens=ranked.tokens)
    return RerankResponse(model=body.model, results=results, usage=usage)
