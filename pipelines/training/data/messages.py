"""The schema of a sample's messages, which is OpenAI's format, and their validation."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, cast

import orjson
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_DEPTH = 100


class SamplePart(BaseModel):
    """A part of a sample. An unknown field could change the meaning, so it is an error unless it is empty."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def drop_empty_fields(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        fields = cast(Mapping[str, Any], value)
        return {name: item for name, item in fields.items() if name in cls.model_fields or item not in (None, [])}


class FunctionCall(SamplePart):
    name: str = Field(min_length=1, max_length=200)
    arguments: str = Field(description="A JSON object, as text.", examples=['{"title": "Inception"}'])

    @field_validator("arguments", mode="before")
    @classmethod
    def serialize_arguments(cls, value: Any) -> Any:
        return orjson.dumps(value).decode() if isinstance(value, dict) else value

    @field_validator("arguments")
    @classmethod
    def validate_arguments(cls, value: str) -> str:
        try:
            arguments = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise ValueError(f"is not JSON: {error}") from None
        if not isinstance(arguments, dict):
            raise ValueError("must be a JSON object, as text")
        validate_text(arguments)
        return value


class ToolCall(SamplePart):
    id: str = Field(min_length=1, max_length=200, examples=["call_1"])
    type: Literal["function"] = "function"
    function: FunctionCall


class Function(SamplePart):
    name: str = Field(min_length=1, max_length=200, examples=["search_movies"])
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="JSON Schema of the arguments.")
    strict: bool | None = None


class Tool(SamplePart):
    """A function that the assistant may call."""

    type: Literal["function"] = "function"
    function: Function


class Message(SamplePart):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = Field(default=None, max_length=200, description="Of a tool's message: which call.")
    name: str | None = Field(default=None, max_length=200)

    @field_validator("role", mode="before")
    @classmethod
    def developer_to_system(cls, value: Any) -> Any:
        return "system" if value == "developer" else value

    @field_validator("content", mode="before")
    @classmethod
    def join_text_parts(cls, value: Any) -> Any:
        """OpenAI's API also accepts content as a list of parts."""
        if not isinstance(value, list):
            return value
        texts = [_text_of(part) for part in cast(list[Any], value)]
        if None in texts:
            raise ValueError("only text is supported, not images or audio")
        return "".join(text for text in texts if text)

    @model_validator(mode="before")
    @classmethod
    def drop_weight(cls, value: Any) -> Any:
        """OpenAI's files may give a message a weight: 1 is the default, 0 excludes it, which is not supported."""
        if isinstance(value, dict) and "weight" in value:
            message = cast(dict[str, Any], value)
            if message["weight"] not in (None, 1):
                raise ValueError("training uses every answer: remove the weight, or the message")
            return {name: item for name, item in message.items() if name != "weight"}
        return value

    @model_validator(mode="after")
    def validate_role(self) -> Self:
        if self.role == "assistant":
            if self.tool_calls is not None and not self.tool_calls:
                self.tool_calls = None
            if not self.tool_calls and not (self.content or "").strip():
                raise ValueError("the assistant's message has neither content nor tool_calls")
        elif self.tool_calls:
            raise ValueError("only a message of the assistant may have tool_calls")
        elif self.content is None or (self.role == "user" and not self.content.strip()):
            raise ValueError(f"the {self.role}'s message has no content")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("a tool's message must have a tool_call_id, and no other message may have one")
        return self


def validate_conversation(messages: Sequence[Message], tools: Sequence[Tool] | None) -> None:
    """Raise ValueError if no chat template can render the conversation, or if it has no answer to train on."""
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise ValueError("it has no message of the assistant, so there is nothing to learn")
    if roles[-1] != "assistant":
        raise ValueError(f"its last message is the {roles[-1]}'s; it must be the assistant's")
    tool_names = {tool.function.name for tool in tools or ()}
    call_ids: set[str] = set()
    for number, message in enumerate(messages):
        for call in message.tool_calls or ():
            if call.function.name not in tool_names:
                raise ValueError(f"messages.{number} calls '{call.function.name}', which is not among its tools")
            call_ids.add(call.id)
        if message.tool_call_id is not None and message.tool_call_id not in call_ids:
            raise ValueError(
                f"messages.{number} answers the call '{message.tool_call_id}', which is not among the calls before it"
            )


def validate_text(value: Any) -> None:
    """Raise ValueError if the value is nested too deep, or has a character that databases cannot store."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        if any(isinstance(node, str) and "\0" in node for node in level):
            raise ValueError("text may not contain the character U+0000")
        containers = [node for node in level if isinstance(node, dict | list)]
        level = [
            child for node in containers for child in ((*node, *node.values()) if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def _text_of(part: Any) -> str | None:
    if isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text":
        text = cast(dict[str, Any], part)["text"]
        return text if isinstance(text, str) else None
    return None
