"""The responses of /v1/responses."""

from typing import Any, Literal

from pydantic import BaseModel, Field


class InputDetails(BaseModel):
    cached_tokens: int = Field(description="Tokens that were in the engine's cache.")
    cache_write_tokens: int = Field(description="Tokens that were added to the engine's cache.")


class OutputDetails(BaseModel):
    reasoning_tokens: int | None = Field(description="Null: the engine did not count them.")


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseError(BaseModel):
    code: str
    message: str


class IncompleteDetails(BaseModel):
    reason: Literal["max_output_tokens"]


class Response(BaseModel):
    id: str = Field(examples=["resp_0f3e5d0b6c1f4f0f9b7d6a5e4c3b2a19"])
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed", "cancelled"] = Field(
        description="cancelled: the client disconnected."
    )
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[dict[str, Any]] = Field(description="Items: reasoning, messages, function calls.")
    usage: ResponseUsage | None
    instructions: str | None
    previous_response_id: str | None
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    text: dict[str, Any]
    temperature: float | None
    top_p: float | None
    max_output_tokens: int | None
    top_logprobs: int | None
    store: bool
    metadata: dict[str, str]
    truncation: Literal["disabled"]
    reasoning: dict[str, None]
    background: Literal[False]
    service_tier: Literal["default"]
    max_tool_calls: None
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None


class DeletedResponse(BaseModel):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True
