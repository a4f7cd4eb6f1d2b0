"""The route `/v1/query`."""

from typing import Any

from fastapi import APIRouter, Request

from serve.http.disconnect import while_connected
from serve.http.errors import OPENAI_ERROR_RESPONSES
from serve.models.dependencies import engine_of, models_of
from serve.openai.query_schemas import Query, QueryAnswer
from serve.security.callers import CurrentCaller, owner_of

router = APIRouter(prefix="/v1", tags=["Chat"], responses=OPENAI_ERROR_RESPONSES)


@router.post("/query")
async def query(request: Request, wanted: Query, caller: CurrentCaller) -> QueryAnswer:
    """Answer a single question."""
    meant = await models_of(request).resolve(wanted.model, owner_of(caller))
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": wanted.prompt}]}
    if wanted.temperature is not None:
        asked["temperature"] = wanted.temperature
    answer = await while_connected(request, engine_of(request).complete(meant.reference, asked, meant.source))
    return QueryAnswer(
        response=answer["choices"][0]["message"]["content"] or "",
        model=wanted.model,
        tokens_used=answer["usage"]["total_tokens"],
    )
