"""Formats an engine's chunks as the lines of Ollama's streams."""

from datetime import UTC, datetime
from time import perf_counter_ns
from typing import Any

import orjson
from fastapi import Response

from serve.engines.collect import ChunkAccumulator
from serve.engines.protocol import Chunk

NDJSON = "application/x-ndjson"
NANOSECONDS_PER_MS = 1_000_000

Line = dict[str, Any]


class ResponseFormatter:
    def __init__(self, model: str) -> None:
        self._model = model
        self._started = perf_counter_ns()

    def line(self, **fields: Any) -> Line:
        return {
            "model": self._model,
            "created_at": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}",
            **fields,
            "done": False,
        }

    def final_line(self, reason: str, result: Line | None = None, **fields: Any) -> Line:
        """The last line of a response, with its durations and numbers of tokens."""
        line: Line = {**self.line(**fields), "done": True, "done_reason": reason}
        line["total_duration"] = perf_counter_ns() - self._started
        if result is not None:
            usage, timings = result["usage"], result["timings"]
            line |= {
                "load_duration": int(timings["load_ms"] * NANOSECONDS_PER_MS),
                "prompt_eval_count": usage["prompt_tokens"],
                "prompt_eval_duration": int(timings["prompt_ms"] * NANOSECONDS_PER_MS),
                "eval_count": usage["completion_tokens"],
                "eval_duration": int(timings["predicted_ms"] * NANOSECONDS_PER_MS),
            }
        return line

    def empty_response(self, reason: str) -> Line:
        """The response to a request without a prompt, which only loads or unloads the model."""
        return self.final_line(reason, **self.content_fields("", None))

    def content_fields(self, content: str, thinking: str | None, calls: list[Line] | None = None) -> Line:
        raise NotImplementedError


class ChatFormatter(ResponseFormatter):
    def content_fields(self, content: str, thinking: str | None, calls: list[Line] | None = None) -> Line:
        message = {"role": "assistant", "content": content, "thinking": thinking, "tool_calls": calls}
        return {"message": {name: value for name, value in message.items() if value is not None}}


class GenerateFormatter(ResponseFormatter):
    def content_fields(self, content: str, thinking: str | None, calls: list[Line] | None = None) -> Line:
        return {"response": content, **({} if thinking is None else {"thinking": thinking})}


def partial_lines(accumulator: ChunkAccumulator, chunks: list[Chunk], formatter: ResponseFormatter) -> bytes:
    """The lines for the new text. Tool calls are not streamed: Ollama sends them whole, at the end."""
    add_chunks(accumulator, chunks)
    lines: list[bytes] = []
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice.get("delta", {})
            content, thinking = choice.get("text", delta.get("content")), delta.get("reasoning_content")
            if content or thinking:
                fields = formatter.content_fields(content or "", thinking)
                if choice.get("logprobs"):
                    fields["logprobs"] = choice["logprobs"]["content"]
                lines.append(to_line(formatter.line(**fields)))
    return b"".join(lines)


def add_chunks(accumulator: ChunkAccumulator, chunks: list[Chunk]) -> None:
    for chunk in chunks:
        accumulator.add(chunk)


def tool_calls_of(message: dict[str, Any]) -> list[Line] | None:
    """Tool calls in Ollama's format, with an object of arguments. Incomplete calls are left out."""
    calls = [call["function"] for call in message.get("tool_calls", [])]
    parsed = [(call["name"], _parse_object(call["arguments"])) for call in calls]
    return [
        {"function": {"name": name, "arguments": arguments}} for name, arguments in parsed if arguments is not None
    ] or None


def _parse_object(arguments: str) -> dict[str, Any] | None:
    try:
        return orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return None


def done_reason(choice: dict[str, Any]) -> str:
    return "length" if choice["finish_reason"] == "length" else "stop"


def json_response(line: Line) -> Response:
    return Response(orjson.dumps(line), media_type="application/json")


def to_line(line: Line) -> bytes:
    return orjson.dumps(line) + b"\n"
