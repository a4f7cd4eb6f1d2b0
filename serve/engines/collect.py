"""Combines the chunks of a streamed completion into one response."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from serve.engines.protocol import Chunk

TEXT_FIELDS = ("content", "reasoning_content")


async def collect(stream: AsyncGenerator[list[Chunk], None]) -> dict[str, Any]:
    """Read the whole stream, and return the response for a client that does not stream."""
    accumulator = ChunkAccumulator()
    async with aclosing(stream):
        async for chunks in stream:
            for chunk in chunks:
                accumulator.add(chunk)
    return accumulator.result()


class ChunkAccumulator:
    """Takes the chunks of one completion in order, and builds its response without streaming."""

    def __init__(self) -> None:
        self._message: dict[str, Any] = {"role": "assistant", "content": None}
        self._text: str | None = None  # of the completion of a prompt; None for a chat
        self._calls: dict[int, dict[str, Any]] = {}
        self._logprobs: list[Any] = []
        self._finish_reason: str | None = None
        self._stats: dict[str, Any] = {}

    def add(self, chunk: Chunk) -> None:
        self._stats |= {name: chunk[name] for name in ("usage", "timings") if name in chunk}
        for choice in chunk["choices"]:
            self._finish_reason = choice["finish_reason"] or self._finish_reason
            self._logprobs += (choice.get("logprobs") or {}).get("content") or []
            if "text" in choice:
                self._text = (self._text or "") + choice["text"]
            delta = choice.get("delta", {})
            for name in TEXT_FIELDS:
                if delta.get(name):
                    self._message[name] = (self._message.get(name) or "") + delta[name]
            for call in delta.get("tool_calls") or []:
                self._add_tool_call(call)

    def result(self) -> dict[str, Any]:
        choice = {
            "index": 0,
            **({"message": self._final_message()} if self._text is None else {"text": self._text}),
            "logprobs": {"content": self._logprobs} if self._logprobs else None,
            "finish_reason": self._finish_reason,
        }
        return {"choices": [choice], **self._stats}

    def _final_message(self) -> dict[str, Any]:
        message = dict(self._message)
        if self._calls:
            message["tool_calls"] = [self._calls[index] for index in sorted(self._calls)]
        elif message["content"] is None:
            message["content"] = ""
        return message

    def _add_tool_call(self, delta: dict[str, Any]) -> None:
        call = self._calls.setdefault(
            delta["index"], {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
        )
        call["id"] = delta.get("id") or call["id"]
        for name, part in delta.get("function", {}).items():
            call["function"][name] += part
