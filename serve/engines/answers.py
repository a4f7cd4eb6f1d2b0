"""A whole answer, put together from the chunks of a streamed one."""

from typing import Any

from serve.engines.protocol import Chunk

JOINED = ("content", "reasoning_content")


class Answer:
    """Hears chunks, in order; then `whole` is what a client gets that did not want a stream."""

    def __init__(self) -> None:
        self._message: dict[str, Any] = {"role": "assistant", "content": None}
        self._calls: dict[int, dict[str, Any]] = {}
        self._logprobs: list[Any] = []
        self._finish_reason: str | None = None
        self._usage: dict[str, Any] = {}

    def hear(self, chunk: Chunk) -> None:
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk["choices"]:
            self._finish_reason = choice["finish_reason"] or self._finish_reason
            self._logprobs += (choice.get("logprobs") or {}).get("content") or []
            delta = choice["delta"]
            for name in JOINED:
                if delta.get(name):
                    self._message[name] = (self._message.get(name) or "") + delta[name]
            for call in delta.get("tool_calls") or []:
                self._hear_call(call)

    def whole(self) -> dict[str, Any]:
        message = dict(self._message)
        if self._calls:
            message["tool_calls"] = [self._calls[index] for index in sorted(self._calls)]
        elif message["content"] is None:
            message["content"] = ""
        choice = {
            "index": 0,
            "message": message,
            "logprobs": {"content": self._logprobs} if self._logprobs else None,
            "finish_reason": self._finish_reason,
        }
        return {"choices": [choice], "usage": self._usage}

    def _hear_call(self, told: dict[str, Any]) -> None:
        call = self._calls.setdefault(
            told["index"], {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
        )
        call["id"] = told.get("id") or call["id"]
        for name, part in told.get("function", {}).items():
            call["function"][name] += part
