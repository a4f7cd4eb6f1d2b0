"""What a model says, token by token, as what a client hears: whole letters up to a stop, and calls of tools."""

import json
from collections.abc import Callable, Sequence
from secrets import token_hex
from typing import Any

CALL, CALLED = "<tool_call>", "</tool_call>"
UNFINISHED = "\ufffd"
LONGEST_LETTER = 8
"""In tokens. What is unfinished after more is no letter: a model may say any bytes."""

Decode = Callable[[Sequence[int]], str]


class Letters:
    """Text of tokens as they come. A letter may be several tokens; half of one is kept until it is whole."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._begin = self._told = 0  # of the tokens that are decoded anew, and of those that are not told yet

    def hear(self, token: int) -> str:
        self._tokens.append(token)
        # What a token reads as depends on those before it, so a few told ones are decoded with it.
        before = self._decode(self._tokens[self._begin : self._told])
        now = self._decode(self._tokens[self._begin :])
        waiting = len(self._tokens) - self._told
        if len(now) <= len(before) or (now.endswith(UNFINISHED) and waiting <= LONGEST_LETTER):
            return ""
        self._begin, self._told = self._told, len(self._tokens)
        return now[len(before) :]


class Speech:
    """Text up to the first of the stops. What might be the beginning of one is kept back, and so is a call."""

    def __init__(self, stops: Sequence[str], with_tools: bool) -> None:
        self._stops = [stop for stop in stops if stop]
        self._with_tools = with_tools
        self._kept = ""
        self.stopped = False

    def hear(self, text: str) -> str:
        """What can be told now."""
        self._kept += text
        found = [place for stop in self._stops if (place := self._kept.find(stop)) >= 0]
        if found:
            self._kept, self.stopped = self._kept[: min(found)], True
        if self._with_tools and CALL in self._kept:
            end = self._kept.index(CALL)
        elif self.stopped:
            end = len(self._kept)
        else:
            end = len(self._kept) - self._doubtful()
        told, self._kept = self._kept[:end], self._kept[end:]
        return told

    def rest(self) -> tuple[str, list[dict[str, Any]]]:
        """At the end: text that was kept back after all, or calls."""
        calls = _calls(self._kept) if self._with_tools else []
        return ("" if calls else self._kept), calls

    def _doubtful(self) -> int:
        """How many letters at the end could begin a stop, or a call."""
        marks = [*self._stops, *([CALL] if self._with_tools else [])]
        longest = max(map(len, marks), default=1) - 1
        for length in range(min(longest, len(self._kept)), 0, -1):
            if any(mark.startswith(self._kept[-length:]) for mark in marks):
                return length
        return 0


def _calls(text: str) -> list[dict[str, Any]]:
    """The calls in what a model has said, in the way of Qwen's; none if they cannot be read."""
    said = [part.partition(CALLED)[0] for part in text.split(CALL)[1:]]
    try:
        return [_call(json.loads(one)) for one in said]
    except (ValueError, KeyError, TypeError):
        return []


def _call(said: dict[str, Any]) -> dict[str, Any]:
    arguments = said["arguments"]
    function = {
        "name": str(said["name"]),
        "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
    }
    return {"id": f"call_{token_hex(12)}", "type": "function", "function": function}
