"""The stream of one request in a batch."""

from collections.abc import Iterator
from typing import Any

from serve.engines.protocol import Chunk, Request, RequestRefused
from serve.engines.transformers.sampling import Sampling
from serve.engines.transformers.text_stream import Letters, Speech


class RequestStream:
    """One answer in the chunks that a client hears."""

    def __init__(self, request: Request, tokenizer: Any, sampling: Sampling) -> None:
        self._is_prompt = "prompt" in request
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._letters = Letters(lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True))
        self._speech = Speech(request.get("stop", []), with_tools=bool(tools_of(request)))
        self._one_call = request.get("parallel_tool_calls") is False
        self._heard: list[int] = []  # since the last chunk
        self._begun = self._is_prompt

    @property
    def stopped(self) -> bool:
        return self._speech.stopped

    def hear(self, token: int) -> list[Chunk]:
        self._heard.append(token)
        text = self._speech.hear(self._letters.hear(token))
        return [self._chunk(text)] if text else []

    def end(self, finish: str) -> list[Chunk]:
        text, calls = self._speech.rest()
        said = [self._chunk(text)] if text else []
        if calls:
            calls = calls[:1] if self._one_call else calls
            numbered = [{"index": index, **call} for index, call in enumerate(calls)]
            said.append({"choices": [{"index": 0, "delta": {"tool_calls": numbered}, "finish_reason": None}]})
            finish = "tool_calls" if finish == "stop" else finish
        last = {"text": ""} if self._is_prompt else {"delta": {}}
        return [*said, {"choices": [{"index": 0, **last, "finish_reason": finish}]}]

    def _chunk(self, text: str) -> Chunk:
        choice: dict[str, Any] = {"index": 0, "finish_reason": None}
        if self._is_prompt:
            choice["text"] = text
        else:
            choice["delta"] = {"content": text} if self._begun else {"role": "assistant", "content": text}
        self._begun = True
        if self._sampling.told is not None:
            choice["logprobs"] = {"content": list(self._logprobs())}
        return {"choices": [choice]}

    def _logprobs(self) -> Iterator[dict[str, Any]]:
        chosen = self._sampling.chosen[: len(self._heard)]
        del self._sampling.chosen[: len(self._heard)]
        for token, one in zip(self._heard, chosen, strict=True):
            yield {
                **self._named(token, one.logprob),
                "top_logprobs": [self._named(other, logprob) for other, logprob in one.likeliest],
            }
        self._heard.clear()

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.decode([token])
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}


def tools_of(request: Request) -> list[dict[str, Any]]:
    if request.get("tool_choice") == "none":
        return []
    if request.get("tool_choice") == "required":
        raise RequestRefused("This model is run by transformers, where no call can be made sure: tool_choice is auto.")
    return request.get("tools", [])
