"""Turns the generated tokens of one request into the chunks of its stream."""

from collections.abc import Iterator
from typing import Any

from serve.engines.protocol import Chunk, EngineRequest, RequestRefused
from serve.engines.transformers.sampling import Sampling
from serve.engines.transformers.text_stream import IncrementalDecoder, OutputParser


class RequestStream:
    def __init__(self, request: EngineRequest, tokenizer: Any, sampling: Sampling) -> None:
        self._is_prompt = "prompt" in request
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._decoder = IncrementalDecoder(lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True))
        self._parser = OutputParser(request.get("stop", []), with_tools=bool(tools_of(request)))
        self._single_call = request.get("parallel_tool_calls") is False
        self._pending: list[int] = []  # tokens since the last chunk
        self._started = self._is_prompt

    @property
    def stopped(self) -> bool:
        return self._parser.stopped

    def feed(self, token: int) -> list[Chunk]:
        self._pending.append(token)
        text = self._parser.feed(self._decoder.feed(token))
        return [self._chunk(text)] if text else []

    def end(self, finish_reason: str) -> list[Chunk]:
        text, calls = self._parser.flush()
        chunks = [self._chunk(text)] if text else []
        if calls:
            calls = calls[:1] if self._single_call else calls
            numbered = [{"index": index, **call} for index, call in enumerate(calls)]
            chunks.append({"choices": [{"index": 0, "delta": {"tool_calls": numbered}, "finish_reason": None}]})
            finish_reason = "tool_calls" if finish_reason == "stop" else finish_reason
        last = {"text": ""} if self._is_prompt else {"delta": {}}
        return [*chunks, {"choices": [{"index": 0, **last, "finish_reason": finish_reason}]}]

    def _chunk(self, text: str) -> Chunk:
        choice: dict[str, Any] = {"index": 0, "finish_reason": None}
        if self._is_prompt:
            choice["text"] = text
        else:
            choice["delta"] = {"content": text} if self._started else {"role": "assistant", "content": text}
        self._started = True
        if self._sampling.top_logprobs is not None:
            choice["logprobs"] = {"content": list(self._logprobs())}
        return {"choices": [choice]}

    def _logprobs(self) -> Iterator[dict[str, Any]]:
        logprobs = self._sampling.logprobs[: len(self._pending)]
        del self._sampling.logprobs[: len(self._pending)]
        for token, token_logprobs in zip(self._pending, logprobs, strict=True):
            yield {
                **self._token_logprob(token, token_logprobs.logprob),
                "top_logprobs": [self._token_logprob(other, logprob) for other, logprob in token_logprobs.top_logprobs],
            }
        self._pending.clear()

    def _token_logprob(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.decode([token])
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}


def tools_of(request: EngineRequest) -> list[dict[str, Any]]:
    if request.get("tool_choice") == "none":
        return []
    if request.get("tool_choice") == "required":
        raise RequestRefused("This model runs on transformers, which cannot force tool calls. Set tool_choice to auto.")
    return request.get("tools", [])
