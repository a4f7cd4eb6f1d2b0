"""Requests to an engine in Ollama's words, and its answers in those of an engine."""

from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from serve.engines.options import PASSED_ON
from serve.engines.protocol import Chunk, Request, RequestRefused

MILLISECOND = 1_000_000  # Ollama counts in nanoseconds
TAKEN = {"messages", "prompt", "suffix", "tools", "response_format", "logprobs", "top_logprobs", "reasoning_effort"}
OPTIONS = {**{name: name for name in PASSED_ON}, "max_tokens": "num_predict", "stop": "stop", "seed": "seed"}
WITHOUT_EFFECT: dict[str, list[Any]] = {"tool_choice": ["auto", "none"], "parallel_tool_calls": [True]}
"""What says only what Ollama does by itself, when it says this."""


def request_to(request: Request) -> dict[str, Any]:
    """For /api/chat, or with a prompt for /api/generate. What Ollama cannot do is refused."""
    for name, value in request.items():
        known = name in TAKEN or name in OPTIONS or name == "chat_template_kwargs"
        if not known and value not in WITHOUT_EFFECT.get(name, []):
            raise RequestRefused(f"{name} cannot be heeded by a model of the Ollama server.")
    wanted: dict[str, Any] = {"options": {OPTIONS[name]: request[name] for name in OPTIONS.keys() & request.keys()}}
    if (form := request.get("response_format")) and form["type"] != "text":
        wanted["format"] = "json" if form["type"] == "json_object" else form["json_schema"]["schema"]
    if (template := request.get("chat_template_kwargs")) is not None:
        wanted["think"] = request.get("reasoning_effort", template.get("enable_thinking"))
    wanted |= {name: request[name] for name in ("logprobs", "top_logprobs") if name in request}
    if "prompt" in request:
        # With a suffix it is up to the model's template what becomes of both.
        return {**wanted, "prompt": request["prompt"], **_rest(request)}
    if request.get("tools") and request.get("tool_choice") != "none":
        wanted["tools"] = request["tools"]
    return {**wanted, "messages": list(_messages(request["messages"]))}


class Teller:
    """Ollama's parts of one answer, as chunks."""

    def __init__(self, is_text: bool) -> None:
        self._is_text = is_text
        self._calls = 0

    def chunks(self, part: Mapping[str, Any]) -> list[Chunk]:
        told = [{"choices": [self._choice(part)]}] if self._says_something(part) else []
        return [*told, *self._end(part)] if part.get("done") else told

    def _says_something(self, part: Mapping[str, Any]) -> bool:
        message = part.get("message") or {}
        said = (part.get("response"), part.get("thinking"), *(message.get(name) for name in ("content", "thinking")))
        return any(said) or bool(message.get("tool_calls"))

    def _choice(self, part: Mapping[str, Any]) -> dict[str, Any]:
        logprobs = {"content": part["logprobs"]} if part.get("logprobs") else None
        common: dict[str, Any] = {"index": 0, "finish_reason": None, "logprobs": logprobs}
        if self._is_text:
            return {**common, "text": part.get("response") or ""}
        message = part["message"]
        delta = {"content": message.get("content"), "reasoning_content": message.get("thinking")}
        calls = [self._call(call["function"]) for call in message.get("tool_calls") or []]
        said = {name: value for name, value in delta.items() if value}
        return {**common, "delta": {**said, **({"tool_calls": calls} if calls else {})}}

    def _call(self, function: Mapping[str, Any]) -> dict[str, Any]:
        arguments = orjson.dumps(function["arguments"]).decode()
        index, self._calls = self._calls, self._calls + 1
        called = {"name": function["name"], "arguments": arguments}
        return {"index": index, "id": f"call_{index}", "type": "function", "function": called}

    def _end(self, part: Mapping[str, Any]) -> list[Chunk]:
        reason = "tool_calls" if self._calls else "length" if part.get("done_reason") == "length" else "stop"
        last = {"text": ""} if self._is_text else {"delta": {}}
        read, said = part.get("prompt_eval_count") or 0, part.get("eval_count") or 0
        durations = {"load_ms": "load_duration", "prompt_ms": "prompt_eval_duration", "predicted_ms": "eval_duration"}
        return [
            {"choices": [{"index": 0, "finish_reason": reason, "logprobs": None, **last}]},
            {
                "choices": [],
                "usage": {"prompt_tokens": read, "completion_tokens": said, "total_tokens": read + said},
                "timings": {name: (part.get(told) or 0) / MILLISECOND for name, told in durations.items()},
            },
        ]


def _rest(request: Request) -> dict[str, Any]:
    return {"suffix": request["suffix"]} if "suffix" in request else {"raw": True}


def _messages(messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A tool's message names the function that it answers, not the call."""
    names = dict[str, str]()
    for message in messages:
        told: dict[str, Any] = {"role": message["role"], "content": message.get("content") or ""}
        if message.get("reasoning_content"):
            told["thinking"] = message["reasoning_content"]
        if calls := message.get("tool_calls"):
            names |= {call["id"]: call["function"]["name"] for call in calls}
            told["tool_calls"] = [{"function": _function(call["function"])} for call in calls]
        if message["role"] == "tool":
            told["tool_name"] = names.get(message["tool_call_id"], message["tool_call_id"])
        yield told


def _function(called: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {"name": called["name"], "arguments": orjson.loads(called["arguments"])}
    except orjson.JSONDecodeError:
        raise RequestRefused(f"The arguments of a call of {called['name']} are no JSON.") from None
