"""/v1/rerank, as Jina and llama.cpp have it: texts in the order in which they fit a question."""

from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from serve.http.disconnect import while_connected
from serve.http.errors import OPENAI_ERROR_RESPONSES
from serve.http.schemas import Strict
from serve.models.dependencies import engine_of, models_of
from serve.models.embed import Text
from serve.openai.chat_schemas import ModelReference
from serve.openai.embeddings import EmbeddingUsage
from serve.security.callers import CurrentCaller, owner_of

router = APIRouter(prefix="/v1", tags=["Chat"], responses=OPENAI_ERROR_RESPONSES)

MOST_DOCUMENTS = 1000


class RerankRequest(Strict):
    model: ModelReference
    query: Text
    documents: Annotated[list[Text], Field(min_length=1, max_length=MOST_DOCUMENTS)]
    top_n: int | None = Field(default=None, ge=1, description="How many of the best to tell. Null: all.")
    return_documents: bool | None = Field(default=None, description="Null: false.")


class RankedDocument(BaseModel):
    index: int = Field(description="Its place among the documents.")
    relevance_score: float
    document: str | None


class Reranked(BaseModel):
    object: Literal["list"] = "list"
    model: str
    results: list[RankedDocument] = Field(description="The best first.")
    usage: EmbeddingUsage


@router.post("/rerank")
async def rerank(request: Request, wanted: RerankRequest, caller: CurrentCaller) -> Reranked:
    """Say how well texts fit a question, by a model that was made for that."""
    meant = await models_of(request).resolve(wanted.model, owner_of(caller))
    work = engine_of(request).rank(meant.reference, wanted.query, wanted.documents, meant.source)
    ranked = await while_connected(request, work)
    best = sorted(enumerate(ranked.scores), key=lambda one: -one[1])[: wanted.top_n]
    results = [
        RankedDocument(
            index=index,
            relevance_score=score,
            document=wanted.documents[index] if wanted.return_documents else None,
        )
        for index, score in best
    ]
    usage = EmbeddingUsage(prompt_tokens=ranked.tokens, total_tokens=ranked.tokens)
    return Reranked(model=wanted.model, results=results, usage=usage)
