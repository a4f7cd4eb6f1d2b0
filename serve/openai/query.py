"""The route /v1/query: one question, without the rest of a chat."""

from typing import Any

from fastapi import APIRouter, Request

from serve.http.disconnect import cancel_on_disconnect
from serve.models.dependencies import get_engine, get_models
from serve.openai.query_schemas import QueryRequest, QueryResponse
from serve.security.callers import CurrentCaller

router = APIRouter(prefix="/v1")


@router.post("/query")
async def query(request: Request, body: QueryRequest, caller: CurrentCaller) -> QueryResponse:
    """Answer one question."""
    model = await get_models(request).resolve(body.model, caller)
    engine_request: dict[str, Any] = {"messages": [{"role": "user", "content": body.prompt}]}
    if body.temperature is not None:
        engine_request["temperature"] = body.temperature
    completion = await cancel_on_disconnect(
        request, get_engine(request).complete(model.reference, engine_request, model.source, model.account)
    )
    return QueryResponse(
        response=completion["choices"][0]["message"]["content"] or "",
        model=body.model,
        tokens_used=completion["usage"]["total_tokens"],
    )
