"""Chat messages in Ollama's format, and their conversion to OpenAI's, which engines take."""

import json
from collections import deque
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field


class CalledFunction(BaseModel):
    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class Call(BaseModel):
    """A call of a tool. In Ollama's format it has no id, but some clients send one."""

    id: str | None = None
    function: CalledFunction


class Message(BaseModel):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: Annotated[list[str] | None, Field(max_length=0)] = None
    tool_calls: list[Call] | None = None
    tool_name: str | None = Field(default=None, description="In a message of a tool: the name of the function.")
    tool_call_id: str | None = None


def to_openai_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Convert to OpenAI's format, where a message of a tool names the id of the call that it answers."""
    converted: list[dict[str, Any]] = []
    open_calls = deque[tuple[str, str]]()  # name and id, in the order of the calls
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
    """The oldest call of that name that has no answer yet; without a name, the oldest of all."""
    for call in open_calls:
        if name is None or call[0] == name:
            open_calls.remove(call)
            return call[1]
    return name or "call"
