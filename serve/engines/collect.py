"""A whole answer, put together from the chunks of a streamed one."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from serve.engines.protocol import Chunk

JOINED = ("content", "reasoning_content")


async def whole_of(spoken: AsyncGenerator[list[Chunk], None]) -> dict[str, Any]:
    """A stream, heard to its end."""
    answer = Answer()
    async with aclosing(spoken):
        async for chunks in spoken:
            for chunk in chunks:
                answer.hear(chunk)
    return answer.whole()


class Answer:
    """Hears chunks, in order; then `whole` is what a client gets that did not want a stream."""

    def __init__(self) -> None:
        self._message: dict[str, Any] = {"role": "assistant", "content": None}
        self._text: str | None = None  # of a prompt that was gone on from
        self._calls: dict[int, dict[str, Any]] = {}
        self._logprobs: list[Any] = []
        self._finish_reason: str | None = None
        self._measured: dict[str, Any] = {}

    def hear(self, chunk: Chunk) -> None:
        self._measured |= {name: chunk[name] for name in ("usage", "timings") if name in chunk}
        for choice in chunk["choices"]:
            self._finish_reason = choice["finish_reason"] or self._finish_reason
            self._logprobs += (choice.get("logprobs") or {}).get("content") or []
            if "text" in choice:
                self._text = (self._text or "") + choice["text"]
            delta = choice.get("delta", {})
            for name in JOINED:
                if delta.get(name):
                    self._message[name] = (self._message.get(name) or "") + delta[name]
            for call in delta.get("tool_calls") or []:
                self._hear_call(call)

    def whole(self) -> dict[str, Any]:
        choice = {
            "index": 0,
            **({"message": self._said()} if self._text is None else {"text": self._text}),
            "logprobs": {"content": self._logprobs} if self._logprobs else None,
            "finish_reason": self._finish_reason,
        }
        return {"choices": [choice], **self._measured}

    def _said(self) -> dict[str, Any]:
        message = dict(self._message)
        if self._calls:
            message["tool_calls"] = [self._calls[index] for index in sorted(self._calls)]
        elif message["content"] is None:
            message["content"] = ""
        return message

    def _hear_call(self, told: dict[str, Any]) -> None:
        call = self._calls.setdefault(
            told["index"], {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
        )
        call["id"] = told.get("id") or call["id"]
        for name, part in told.get("function", {}).items():
            call["function"][name] += part
