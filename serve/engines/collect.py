"""A whole answer, put together from the chunks of a streamed one."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from serve.engines.protocol import Chunk

TEXT_FIELDS = ("content", "reasoning_content")


async def collect(stream: AsyncGenerator[list[Chunk], None]) -> dict[str, Any]:
    """A stream, heard to its end."""
    answer = ChunkAccumulator()
    async with aclosing(stream):
        async for chunks in stream:
            for chunk in chunks:
                answer.add(chunk)
    return answer.result()


class ChunkAccumulator:
    """Hears chunks, in order; then `whole` is what a client gets that did not want a stream."""

    def __init__(self) -> None:
        self._message: dict[str, Any] = {"role": "assistant", "content": None}
        self._text: str | None = None  # of a prompt that was gone on from
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
