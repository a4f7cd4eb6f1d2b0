"""Translates an engine's requests into Ollama's format, and Ollama's responses into chunks."""

from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from serve.engines.options import PASSTHROUGH_OPTIONS
from serve.engines.protocol import Chunk, EngineRequest, RequestRefused

NANOSECONDS_PER_MS = 1_000_000
SUPPORTED_FIELDS = {
    "messages",
    "prompt",
    "suffix",
    "tools",
    "response_format",
    "logprobs",
    "top_logprobs",
    "reasoning_effort",
}
OPTIONS = {**{name: name for name in PASSTHROUGH_OPTIONS}, "max_tokens": "num_predict", "stop": "stop", "seed": "seed"}
NO_OP_VALUES: dict[str, list[Any]] = {"tool_choice": ["auto", "none"], "parallel_tool_calls": [True]}
"""Fields that Ollama does not have, and the values that ask for its normal behavior."""


def to_ollama_request(request: EngineRequest) -> dict[str, Any]:
    """The body for /api/chat, or with a prompt for /api/generate. A field that Ollama does not support is an error."""
    for name, value in request.items():
        known = name in SUPPORTED_FIELDS or name in OPTIONS or name == "chat_template_kwargs"
        if not known and value not in NO_OP_VALUES.get(name, []):
            raise RequestRefused(f"Models of the Ollama server do not support {name}.")
    body: dict[str, Any] = {"options": {OPTIONS[name]: request[name] for name in OPTIONS.keys() & request.keys()}}
    if (response_format := request.get("response_format")) and response_format["type"] != "text":
        body["format"] = (
            "json" if response_format["type"] == "json_object" else response_format["json_schema"]["schema"]
        )
    if (template_kwargs := request.get("chat_template_kwargs")) is not None:
        body["think"] = request.get("reasoning_effort", template_kwargs.get("enable_thinking"))
    body |= {name: request[name] for name in ("logprobs", "top_logprobs") if name in request}
    if "prompt" in request:
        # A suffix needs the model's template, so only a prompt without one is raw.
        return {**body, "prompt": request["prompt"], **_prompt_options(request)}
    if request.get("tools") and request.get("tool_choice") != "none":
        body["tools"] = request["tools"]
    return {**body, "messages": list(_messages(request["messages"]))}


class ChunkParser:
    """Converts the parts of one streamed response of Ollama to chunks."""

    def __init__(self, is_text: bool) -> None:
        self._is_text = is_text
        self._calls = 0

    def parse(self, part: Mapping[str, Any]) -> list[Chunk]:
        chunks = [{"choices": [self._choice(part)]}] if self._has_content(part) else []
        return [*chunks, *self._end(part)] if part.get("done") else chunks

    def _has_content(self, part: Mapping[str, Any]) -> bool:
        message = part.get("message") or {}
        texts = (part.get("response"), part.get("thinking"), *(message.get(name) for name in ("content", "thinking")))
        return any(texts) or bool(message.get("tool_calls"))

    def _choice(self, part: Mapping[str, Any]) -> dict[str, Any]:
        logprobs = {"content": part["logprobs"]} if part.get("logprobs") else None
        common: dict[str, Any] = {"index": 0, "finish_reason": None, "logprobs": logprobs}
        if self._is_text:
            return {**common, "text": part.get("response") or ""}
        message = part["message"]
        delta = {"content": message.get("content"), "reasoning_content": message.get("thinking")}
        calls = [self._call(call["function"]) for call in message.get("tool_calls") or []]
        filled = {name: value for name, value in delta.items() if value}
        return {**common, "delta": {**filled, **({"tool_calls": calls} if calls else {})}}

    def _call(self, function: Mapping[str, Any]) -> dict[str, Any]:
        arguments = orjson.dumps(function["arguments"]).decode()
        index, self._calls = self._calls, self._calls + 1
        function_call = {"name": function["name"], "arguments": arguments}
        return {"index": index, "id": f"call_{index}", "type": "function", "function": function_call}

    def _end(self, part: Mapping[str, Any]) -> list[Chunk]:
        reason = "tool_calls" if self._calls else "length" if part.get("done_reason") == "length" else "stop"
        last = {"text": ""} if self._is_text else {"delta": {}}
        prompt_tokens, completion_tokens = part.get("prompt_eval_count") or 0, part.get("eval_count") or 0
        durations = {"load_ms": "load_duration", "prompt_ms": "prompt_eval_duration", "predicted_ms": "eval_duration"}
        return [
            {"choices": [{"index": 0, "finish_reason": reason, "logprobs": None, **last}]},
            {
                "choices": [],
                "usage": {
                    "prompt_tokens": prompt_tokens,
                    "completion_tokens": completion_tokens,
                    "total_tokens": prompt_tokens + completion_tokens,
                },
                "timings": {
                    name: (part.get(ollama_name) or 0) / NANOSECONDS_PER_MS for name, ollama_name in durations.items()
                },
            },
        ]


def _prompt_options(request: EngineRequest) -> dict[str, Any]:
    return {"suffix": request["suffix"]} if "suffix" in request else {"raw": True}


def _messages(messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """In Ollama's format a tool's message names the function that it answers, not the id of the call."""
    names = dict[str, str]()
    for message in messages:
        converted: dict[str, Any] = {"role": message["role"], "content": message.get("content") or ""}
        if message.get("reasoning_content"):
            converted["thinking"] = message["reasoning_content"]
        if calls := message.get("tool_calls"):
            names |= {call["id"]: call["function"]["name"] for call in calls}
            converted["tool_calls"] = [{"function": _function(call["function"])} for call in calls]
        if message["role"] == "tool":
            converted["tool_name"] = names.get(message["tool_call_id"], message["tool_call_id"])
        yield converted


def _function(function: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {"name": function["name"], "arguments": orjson.loads(function["arguments"])}
    except orjson.JSONDecodeError:
        raise RequestRefused(f"The arguments of a call of {function['name']} are not valid JSON.") from None
