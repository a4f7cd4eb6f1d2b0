"""What a model says, token by token, as what a client hears: whole letters up to a stop, and calls of tools."""

import json
from collections.abc import Callable, Sequence
from secrets import token_hex
from typing import Any

TOOL_CALL_START, TOOL_CALL_END = "<tool_call>", "</tool_call>"
REPLACEMENT_CHARACTER = "\ufffd"
MAX_CHARACTER_TOKENS = 8
"""In tokens. What is unfinished after more is no letter: a model may say any bytes."""

Decode = Callable[[Sequence[int]], str]


class IncrementalDecoder:
    """Text of tokens as they come. A letter may be several tokens; half of one is kept until it is whole."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._context_start = self._emitted = (
            0  # of the tokens that are decoded anew, and of those that are not told yet
        )

    def feed(self, token: int) -> str:
        self._tokens.append(token)
        # What a token reads as depends on those before it, so a few told ones are decoded with it.
        before = self._decode(self._tokens[self._context_start : self._emitted])
        now = self._decode(self._tokens[self._context_start :])
        pending = len(self._tokens) - self._emitted
        if len(now) <= len(before) or (now.endswith(REPLACEMENT_CHARACTER) and pending <= MAX_CHARACTER_TOKENS):
            return ""
        self._context_start, self._emitted = self._emitted, len(self._tokens)
        return now[len(before) :]


class OutputParser:
    """Text up to the first of the stops. What might be the beginning of one is kept back, and so is a call."""

    def __init__(self, stops: Sequence[str], with_tools: bool) -> None:
        self._stops = [stop for stop in stops if stop]
        self._with_tools = with_tools
        self._buffer = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """What can be told now."""
        self._buffer += text
        positions = [position for stop in self._stops if (position := self._buffer.find(stop)) >= 0]
        if positions:
            self._buffer, self.stopped = self._buffer[: min(positions)], True
        if self._with_tools and TOOL_CALL_START in self._buffer:
            end = self._buffer.index(TOOL_CALL_START)
        elif self.stopped:
            end = len(self._buffer)
        else:
            end = len(self._buffer) - self._partial_marker_length()
        released, self._buffer = self._buffer[:end], self._buffer[end:]
        return released

    def flush(self) -> tuple[str, list[dict[str, Any]]]:
        """At the end: text that was kept back after all, or calls."""
        calls = _parse_tool_calls(self._buffer) if self._with_tools else []
        return ("" if calls else self._buffer), calls

    def _partial_marker_length(self) -> int:
        """How many letters at the end could begin a stop, or a call."""
        markers = [*self._stops, *([TOOL_CALL_START] if self._with_tools else [])]
        max_length = max(map(len, markers), default=1) - 1
        for length in range(min(max_length, len(self._buffer)), 0, -1):
            if any(marker.startswith(self._buffer[-length:]) for marker in markers):
                return length
        return 0


def _parse_tool_calls(text: str) -> list[dict[str, Any]]:
    """The calls in what a model has said, in the way of Qwen's; none if they cannot be read."""
    documents = [part.partition(TOOL_CALL_END)[0] for part in text.split(TOOL_CALL_START)[1:]]
    try:
        return [_parse_tool_call(json.loads(document)) for document in documents]
    except (ValueError, KeyError, TypeError):
        return []


def _parse_tool_call(document: dict[str, Any]) -> dict[str, Any]:
    arguments = document["arguments"]
    function = {
        "name": str(document["name"]),
        "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
    }
    return {"id": f"call_{token_hex(12)}", "type": "function", "function": function}
