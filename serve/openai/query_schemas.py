"""Request and response of `/v1/query`."""

from pydantic import BaseModel, Field

from serve.http.schemas import Strict
from serve.openai.chat_schemas import ModelReference


class Query(Strict):
    prompt: str = Field(min_length=1)
    model: ModelReference
    temperature: float | None = Field(default=None, ge=0, le=2)


class QueryAnswer(BaseModel):
    response: str
    model: str
    tokens_used: int
