"""Converts the items of the Responses API into the messages of a chat, which engines take."""

from collections.abc import Iterable, Sequence
from typing import Any

from serve.openai.responses.items import CallNotFound, Item


def to_messages(items: Iterable[Item]) -> list[dict[str, Any]]:
    """Convert items to messages. Consecutive reasoning, text and calls of the assistant become one message."""
    messages: list[dict[str, Any]] = []
    turn: dict[str, Any] | None = None  # the assistant's current message
    for item in items:
        kind = item["type"]
        if not (kind in {"reasoning", "function_call"} or item.get("role") == "assistant"):
            turn = None
            messages.append(_other_message(item))
            continue
        starts_turn = kind != "function_call" and turn is not None and (turn["content"] or "tool_calls" in turn)
        if turn is None or starts_turn:
            turn = {"role": "assistant", "content": ""}
            messages.append(turn)
        if kind == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            turn.setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})
        elif kind == "message":
            turn["content"] = _join_text(item["content"])
        elif reasoning := _join_text(item["content"] or item["summary"]):
            turn["reasoning_content"] = turn.get("reasoning_content", "") + reasoning
    return messages


def check_calls(items: Sequence[Item]) -> None:
    """Reject an output without a preceding call: a chat template would show it to the model as a real one."""
    known_call_ids: set[str] = set()
    for item in items:
        if item["type"] == "function_call":
            known_call_ids.add(item["call_id"])
        if item["type"] == "function_call_output" and item["call_id"] not in known_call_ids:
            raise CallNotFound(f"The conversation has no call '{item['call_id']}' before its output.")


def _other_message(item: Item) -> dict[str, Any]:
    if item["type"] == "function_call_output":
        output = item["output"]
        text = output if isinstance(output, str) else _join_text(output)
        return {"role": "tool", "tool_call_id": item["call_id"], "content": text}
    role = "system" if item["role"] == "developer" else item["role"]
    return {"role": role, "content": _join_text(item["content"])}


def _join_text(parts: Iterable[Item]) -> str:
    return "".join(part["text"] for part in parts)
