"""An engine's chunks as the lines of Ollama's stream."""

from datetime import UTC, datetime
from time import perf_counter_ns
from typing import Any

import orjson
from fastapi import Response

from serve.engines.collect import Answer
from serve.engines.protocol import Chunk

NDJSON = "application/x-ndjson"
MILLISECOND = 1_000_000  # Ollama counts in nanoseconds

Line = dict[str, Any]


class Teller:
    """An answer in Ollama's words."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._began = perf_counter_ns()

    def line(self, **said: Any) -> Line:
        return {"model": self._model, "created_at": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}", **said, "done": False}

    def last(self, reason: str, answer: Line | None = None, **said: Any) -> Line:
        """The line that ends an answer, with what it has cost."""
        ended: Line = {**self.line(**said), "done": True, "done_reason": reason}
        ended["total_duration"] = perf_counter_ns() - self._began
        if answer is not None:
            usage, timings = answer["usage"], answer["timings"]
            ended |= {
                "load_duration": int(timings["load_ms"] * MILLISECOND),
                "prompt_eval_count": usage["prompt_tokens"],
                "prompt_eval_duration": int(timings["prompt_ms"] * MILLISECOND),
                "eval_count": usage["completion_tokens"],
                "eval_duration": int(timings["predicted_ms"] * MILLISECOND),
            }
        return ended

    def silence(self, reason: str) -> Line:
        """The only line of an answer to nothing."""
        return self.last(reason, **self.part("", None))

    def part(self, content: str, thinking: str | None, calls: list[Line] | None = None) -> Line:
        raise NotImplementedError


class ChatTeller(Teller):
    def part(self, content: str, thinking: str | None, calls: list[Line] | None = None) -> Line:
        said = {"role": "assistant", "content": content, "thinking": thinking, "tool_calls": calls}
        return {"message": {name: value for name, value in said.items() if value is not None}}


class GenerateTeller(Teller):
    def part(self, content: str, thinking: str | None, calls: list[Line] | None = None) -> Line:
        return {"response": content, **({} if thinking is None else {"thinking": thinking})}


def partial_lines(answer: Answer, chunks: list[Chunk], teller: Teller) -> bytes:
    """What is said now. A call comes only when it is whole: so Ollama tells it."""
    add_chunks(answer, chunks)
    lines: list[bytes] = []
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice.get("delta", {})
            content, thinking = choice.get("text", delta.get("content")), delta.get("reasoning_content")
            if content or thinking:
                heard = teller.part(content or "", thinking)
                if choice.get("logprobs"):
                    heard["logprobs"] = choice["logprobs"]["content"]
                lines.append(to_line(teller.line(**heard)))
    return b"".join(lines)


def add_chunks(answer: Answer, chunks: list[Chunk]) -> None:
    for chunk in chunks:
        answer.hear(chunk)


def tool_calls_of(message: dict[str, Any]) -> list[Line] | None:
    """Ollama's arguments are an object; a model that was cut off may have written half of one."""
    calls = [call["function"] for call in message.get("tool_calls", [])]
    whole = [(call["name"], _object(call["arguments"])) for call in calls]
    return [{"function": {"name": name, "arguments": said}} for name, said in whole if said is not None] or None


def _object(arguments: str) -> dict[str, Any] | None:
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
