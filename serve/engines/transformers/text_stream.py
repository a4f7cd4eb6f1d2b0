"""Turns generated tokens into text and tool calls: complete characters only, up to a stop sequence."""

import json
from collections.abc import Callable, Sequence
from secrets import token_hex
from typing import Any

TOOL_CALL_START, TOOL_CALL_END = "<tool_call>", "</tool_call>"
REPLACEMENT_CHARACTER = "\ufffd"
MAX_CHARACTER_TOKENS = 8
"""A character that is incomplete after that many tokens is invalid: a model may generate any bytes."""

Decode = Callable[[Sequence[int]], str]


class IncrementalDecoder:
    """Decodes tokens as they come. Holds back an incomplete character, which may be spread over tokens."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._context_start = 0  # of the tokens that are decoded again
        self._emitted = 0  # tokens whose text was returned

    def feed(self, token: int) -> str:
        self._tokens.append(token)
        # The text of a token depends on those before it, so the last emitted ones are decoded with it.
        context = self._decode(self._tokens[self._context_start : self._emitted])
        text = self._decode(self._tokens[self._context_start :])
        pending = len(self._tokens) - self._emitted
        if len(text) <= len(context) or (text.endswith(REPLACEMENT_CHARACTER) and pending <= MAX_CHARACTER_TOKENS):
            return ""
        self._context_start, self._emitted = self._emitted, len(self._tokens)
        return text[len(context) :]


class OutputParser:
    """Passes text up to the first stop sequence. Holds back tool calls, and a possible start of a stop sequence."""

    def __init__(self, stops: Sequence[str], with_tools: bool) -> None:
        self._stops = [stop for stop in stops if stop]
        self._with_tools = with_tools
        self._buffer = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """Add text, and return what can be sent to the client."""
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
        """At the end: the text that was held back, or the tool calls in it."""
        calls = _parse_tool_calls(self._buffer) if self._with_tools else []
        return ("" if calls else self._buffer), calls

    def _partial_marker_length(self) -> int:
        """The number of characters at the end that may start a stop sequence or a tool call."""
        markers = [*self._stops, *([TOOL_CALL_START] if self._with_tools else [])]
        max_length = max(map(len, markers), default=1) - 1
        for length in range(min(max_length, len(self._buffer)), 0, -1):
            if any(marker.startswith(self._buffer[-length:]) for marker in markers):
                return length
        return 0


def _parse_tool_calls(text: str) -> list[dict[str, Any]]:
    """Parse tool calls in Qwen's format. The result is empty if any is invalid."""
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
