"""The items of the Responses API: messages, reasoning, function calls and their outputs."""

from typing import Annotated, Any, Literal

from pydantic import Field

from cluster.errors import InvalidRequest
from serve.http.schemas import StrictModel

Item = dict[str, Any]
ItemStatus = Literal["in_progress", "completed", "incomplete"]
ItemId = Annotated[str, Field(min_length=1, max_length=100)]

LOGPROBS_INCLUDE = "message.output_text.logprobs"
MAX_ITEMS = 10_000
ITEM_ID_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}
PLACEHOLDER_MESSAGES = [{"role": "user", "content": ""}]
"""Messages for validating the other fields of a request."""


class CallNotFound(InvalidRequest):
    """A function's output needs a call, which is before it in the conversation."""

    code = "CALL_NOT_FOUND"


class InputText(StrictModel):
    type: Literal["input_text"]
    text: str


class OutputText(StrictModel):
    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = Field(default=None, max_length=0)
    logprobs: list[dict[str, Any]] | None = None


class Message(StrictModel):
    """A message. A received answer may be sent back unchanged; OpenAI's other fields of an answer must be null."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[InputText | OutputText, Field(discriminator="type")]]
    id: ItemId | None = None
    status: ItemStatus | None = None
    phase: None = None

    def to_item(self) -> Item:
        texts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        if self.role == "assistant":
            content = [{"type": "output_text", "text": text, "annotations": []} for text in texts]
        else:
            content = [{"type": "input_text", "text": text} for text in texts]
        return {"type": "message", "role": self.role, "content": content, "status": "completed"}


class FunctionCallItem(StrictModel):
    type: Literal["function_call"]
    call_id: str = Field(min_length=1, max_length=200)
    name: str = Field(min_length=1)
    arguments: str = Field(description="JSON.")
    id: ItemId | None = None
    status: ItemStatus | None = None
    namespace: None = None
    caller: None = None

    def to_item(self) -> Item:
        return {**self.model_dump(include={"type", "call_id", "name", "arguments"}), "status": "completed"}


class FunctionCallOutput(StrictModel):
    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1, max_length=200, description="The id of the call.")
    output: str | list[InputText]
    id: ItemId | None = None
    status: ItemStatus | None = None

    def to_item(self) -> Item:
        return {**self.model_dump(include={"type", "call_id", "output"}), "status": "completed"}


class ReasoningText(StrictModel):
    type: Literal["reasoning_text"]
    text: str


class SummaryText(StrictModel):
    type: Literal["summary_text"]
    text: str


class Reasoning(StrictModel):
    """The reasoning of a model as text. Encrypted reasoning is not supported."""

    type: Literal["reasoning"]
    summary: list[SummaryText] = Field(default_factory=list[SummaryText])
    content: list[ReasoningText] | None = None
    encrypted_content: None = None
    id: ItemId | None = None
    status: ItemStatus | None = None

    def to_item(self) -> Item:
        content = [part.model_dump() for part in self.content or []]
        return {**self.model_dump(include={"type", "summary"}), "content": content, "status": "completed"}


class ItemReference(StrictModel):
    """A reference to an item of a stored response."""

    type: Literal["item_reference"] | None = None
    id: ItemId


def item_type(item: Any) -> str | None:
    if not isinstance(item, dict):
        return getattr(item, "type", None) or "item_reference"
    return item.get("type") or ("message" if "role" in item else "item_reference")


def item_id(response_id: str, kind: str, position: int) -> str:
    """The id contains the id of the response, and the position among its input and output items."""
    return f"{ITEM_ID_PREFIXES[kind]}_{response_id.removeprefix('resp_')}{position:04x}"
