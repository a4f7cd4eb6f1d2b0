"""The request and the response of /v1/query."""

from pydantic import BaseModel, Field

from serve.http.schemas import StrictModel
from serve.openai.chat_schemas import ModelReference


class QueryRequest(StrictModel):
    prompt: str = Field(min_length=1)
    model: ModelReference
    temperature: float | None = Field(default=None, ge=0, le=2)


class QueryResponse(BaseModel):
    response: str
    model: str
    tokens_used: int
