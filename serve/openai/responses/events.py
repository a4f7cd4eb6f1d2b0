"""A response as it comes to be: what an engine says becomes items, and events that tell of them, as OpenAI has it."""

import time
from copy import deepcopy
from secrets import token_hex
from typing import Any

from cluster.errors import ForgearrError
from serve.engines.protocol import Chunk
from serve.openai.responses.items import Item, item_id

Event = dict[str, Any]

ENDINGS = {"completed": "response.completed", "failed": "response.failed"}
"""Of any other status: response.incomplete."""
OF_A_TOKEN = ("token", "logprob", "bytes")


def new_response_id() -> str:
    return f"resp_{token_hex(16)}"


class Telling:
    """Hears an answer; `response` is what there is of it until now."""

    def __init__(self, response_id: str, repeated: dict[str, Any], items_before: int = 0) -> None:
        self.response: dict[str, Any] = {
            "id": response_id,
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
            **repeated,
        }
        self._items_before = items_before
        self._events = 0
        self._open = False  # whether the last item is still being said
        self._call: int | None = None  # the number that the engine gives the call that is being said
        self._finish_reason: str | None = None

    def begin(self) -> list[Event]:
        return [self._event(kind, response=self._now()) for kind in ("response.created", "response.in_progress")]

    def hear(self, chunk: Chunk) -> list[Event]:
        events: list[Event] = []
        for choice in chunk["choices"]:
            delta = choice["delta"]
            if thought := delta.get("reasoning_content"):
                events += self._go_on("reasoning") + self._say(thought)
            if said := delta.get("content"):
                events += self._go_on("message") + self._say(said, _logprobs(choice))
            for call in delta.get("tool_calls") or []:
                events += self._hear_call(call)
            self._finish_reason = choice["finish_reason"] or self._finish_reason
        if "usage" in chunk:
            self.response["usage"] = self._usage(chunk["usage"])
        return events

    def end(self) -> list[Event]:
        full = self._finish_reason == "length"
        events = [] if self.response["output"] else self._begin_item("message")
        events += self._close("incomplete" if full else "completed")
        if full:
            return events + self._finish("incomplete", incomplete_details={"reason": "max_output_tokens"})
        return events + self._finish("completed", completed_at=int(time.time()))

    def fail(self, error: ForgearrError) -> list[Event]:
        told = {"code": "server_error", "message": error.message}
        return self._close("incomplete") + self._finish("failed", error=told)

    def leave(self) -> None:
        """Nobody listens any more."""
        self._close("incomplete")
        self._finish("cancelled")

    def tell_again(self, told: dict[str, Any]) -> list[Event]:
        """The events of a response that has been told, with each text as one piece."""
        events = self.begin()
        for item in told["output"]:
            said = item.get("arguments") or "".join(part["text"] for part in item.get("content", ()))
            logprobs = [one for part in item.get("content", ()) for one in part.get("logprobs") or ()]
            blank = {"arguments": ""} if item["type"] == "function_call" else {"content": []}
            events += self._begin_item(item["type"], {**item, **blank, "status": "in_progress"})
            events += (self._say(said, logprobs) if said else []) + self._close(item["status"])
        return events + self._finish(**told)

    def refuse(self, error: ForgearrError) -> Event:
        """What ends a stream that cannot even say how the response ended."""
        return self._event("error", code=error.code.lower(), message=error.message, param=None)

    def _hear_call(self, told: dict[str, Any]) -> list[Event]:
        function, events = told.get("function", {}), list[Event]()
        if self._call != told["index"]:
            events += self._close("completed")
            about = {"call_id": told.get("id") or f"call_{token_hex(12)}", "name": "", "arguments": ""}
            events += self._begin_item("function_call", about | {"name": function.get("name", "")})
            self._call = told["index"]
        if arguments := function.get("arguments"):
            events += self._say(arguments)
        return events

    def _go_on(self, kind: str) -> list[Event]:
        """With the item that is open if it is of this kind, else with a new one."""
        if self._open and self._item["type"] == kind:
            return []
        return self._close("completed") + self._begin_item(kind)

    def _begin_item(self, kind: str, about: Item | None = None) -> list[Event]:
        output = self.response["output"]
        identifier = item_id(self.response["id"], kind, self._items_before + len(output))
        item: Item = {"id": identifier, "type": kind, "status": "in_progress"}
        if kind == "message":
            item |= {"role": "assistant", "content": []}
        if kind == "reasoning":
            item |= {"summary": [], "content": []}
        output.append(item | (about or {}))
        self._open = True
        events = [self._item_event("response.output_item.added", item=deepcopy(self._item))]
        if kind != "function_call":
            part: Item = {"type": "reasoning_text", "text": ""}
            if kind == "message":
                part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self._item["content"].append(part)
            events.append(self._part_event("response.content_part.added", part=deepcopy(part)))
        return events

    def _say(self, text: str, logprobs: list[Item] | None = None) -> list[Event]:
        item = self._item
        if item["type"] == "function_call":
            item["arguments"] += text
            return [self._said_event("response.function_call_arguments.delta", delta=text)]
        part = item["content"][0]
        part["text"] += text
        if item["type"] == "reasoning":
            return [self._part_event("response.reasoning_text.delta", delta=text)]
        part["logprobs"] += logprobs or []
        return [self._part_event("response.output_text.delta", delta=text, logprobs=logprobs or [])]

    def _close(self, status: str) -> list[Event]:
        if not self._open:
            return []
        item = self._item
        item["status"] = status
        if item["type"] == "function_call":
            said = {"name": item["name"], "arguments": item["arguments"]}
            events = [self._said_event("response.function_call_arguments.done", **said)]
        else:
            part = deepcopy(item["content"][0])
            told = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
            kind = "response.output_text.done" if item["type"] == "message" else "response.reasoning_text.done"
            events = [
                self._part_event(kind, text=part["text"], **told),
                self._part_event("response.content_part.done", part=part),
            ]
        events.append(self._item_event("response.output_item.done", item=deepcopy(item)))
        self._open, self._call = False, None
        return events

    def _finish(self, status: str, **told: Any) -> list[Event]:
        self.response |= {**told, "status": status}
        return [self._event(ENDINGS.get(status, "response.incomplete"), response=self._now())]

    @property
    def _item(self) -> Item:
        return self.response["output"][-1]

    def _usage(self, told: dict[str, Any]) -> dict[str, Any]:
        read, said = told["prompt_tokens"], told["completion_tokens"]
        remembered = (told.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        thought = any(item["type"] == "reasoning" for item in self.response["output"])
        return {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": remembered, "cache_write_tokens": read - remembered},
            "output_tokens": said,
            "output_tokens_details": {"reasoning_tokens": None if thought else 0},
            "total_tokens": told["total_tokens"],
        }

    def _now(self) -> dict[str, Any]:
        return {**self.response, "output": list(self.response["output"])}

    def _part_event(self, kind: str, **told: Any) -> Event:
        return self._said_event(kind, content_index=0, **told)

    def _said_event(self, kind: str, **told: Any) -> Event:
        return self._item_event(kind, item_id=self._item["id"], **told)

    def _item_event(self, kind: str, **told: Any) -> Event:
        return self._event(kind, output_index=len(self.response["output"]) - 1, **told)

    def _event(self, kind: str, **told: Any) -> Event:
        event = {"type": kind, "sequence_number": self._events, **told}
        self._events += 1
        return event


def _logprobs(choice: dict[str, Any]) -> list[Item]:
    told = (choice.get("logprobs") or {}).get("content") or []
    return [_of_a_token(one) | {"top_logprobs": [_of_a_token(top) for top in one["top_logprobs"]]} for one in told]


def _of_a_token(told: dict[str, Any]) -> Item:
    return {name: told[name] for name in OF_A_TOKEN}
