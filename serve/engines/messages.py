"""The messages of a chat, as engines take them."""

import json
from collections import deque
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field


class CalledFunction(BaseModel):
    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class Call(BaseModel):
    """Ollama's calls have no id of their own; those of some clients do."""

    id: str | None = None
    function: CalledFunction


class Message(BaseModel):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: Annotated[list[str] | None, Field(max_length=0)] = None
    tool_calls: list[Call] | None = None
    tool_name: str | None = Field(default=None, description="Of a tool's message: the function that was called.")
    tool_call_id: str | None = None


def to_openai_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """As OpenAI has it, where a tool's message names the call that it answers."""
    converted: list[dict[str, Any]] = []
    open_calls = deque[tuple[str, str]]()  # name and id, in the order in which they were made
    for number, message in enumerate(messages):
        openai_message: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.thinking:
            openai_message["reasoning_content"] = message.thinking
        if message.tool_calls:
            openai_message["tool_calls"] = []
            for index, call in enumerate(message.tool_calls):
                identifier = call.id or f"call_{number}_{index}"
                open_calls.append((call.function.name, identifier))
                arguments = json.dumps(call.function.arguments, ensure_ascii=False, separators=(",", ":"))
                function = {"name": call.function.name, "arguments": arguments}
                openai_message["tool_calls"].append({"id": identifier, "type": "function", "function": function})
        if message.role == "tool":
            openai_message["tool_call_id"] = message.tool_call_id or _answered_call_id(open_calls, message.tool_name)
        converted.append(openai_message)
    return converted


def _answered_call_id(open_calls: deque[tuple[str, str]], name: str | None) -> str:
    """The oldest call of that name that has no answer yet, or the oldest of all when none is named."""
    for call in open_calls:
        if name is None or call[0] == name:
            open_calls.remove(call)
            return call[1]
    return name or "call"
