"""Builds a response from the chunks of an engine: its items, and the events of its stream in OpenAI's format."""

import time
from copy import deepcopy
from secrets import token_hex
from typing import Any

from cluster.errors import ForgearrError
from serve.engines.protocol import Chunk
from serve.openai.responses.items import Item, item_id

Event = dict[str, Any]

END_EVENTS = {"completed": "response.completed", "failed": "response.failed"}
"""Any other status: response.incomplete."""
TOKEN_FIELDS = ("token", "logprob", "bytes")


def new_response_id() -> str:
    return f"resp_{token_hex(16)}"


class ResponseStream:
    """Takes chunks and returns events. `response` is the response so far."""

    def __init__(self, response_id: str, request_fields: dict[str, Any], items_before: int = 0) -> None:
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
            **request_fields,
        }
        self._items_before = items_before
        self._events = 0
        self._is_item_open = False  # whether the last item is still being generated
        self._call_index: int | None = None  # the engine's index of the call that is being generated
        self._finish_reason: str | None = None

    def begin(self) -> list[Event]:
        return [self._event(kind, response=self._snapshot()) for kind in ("response.created", "response.in_progress")]

    def feed(self, chunk: Chunk) -> list[Event]:
        events: list[Event] = []
        for choice in chunk["choices"]:
            delta = choice["delta"]
            if reasoning := delta.get("reasoning_content"):
                events += self._advance("reasoning") + self._append_text(reasoning)
            if text := delta.get("content"):
                events += self._advance("message") + self._append_text(text, _logprobs(choice))
            for call in delta.get("tool_calls") or []:
                events += self._feed_tool_call(call)
            self._finish_reason = choice["finish_reason"] or self._finish_reason
        if "usage" in chunk:
            self.response["usage"] = self._usage(chunk["usage"])
        return events

    def end(self) -> list[Event]:
        is_truncated = self._finish_reason == "length"
        events = [] if self.response["output"] else self._begin_item("message")
        events += self._close_item("incomplete" if is_truncated else "completed")
        if is_truncated:
            return events + self._finish("incomplete", incomplete_details={"reason": "max_output_tokens"})
        return events + self._finish("completed", completed_at=int(time.time()))

    def fail(self, error: ForgearrError) -> list[Event]:
        error_body = {"code": "server_error", "message": error.message}
        return self._close_item("incomplete") + self._finish("failed", error=error_body)

    def cancel(self) -> None:
        self._close_item("incomplete")
        self._finish("cancelled")

    def replay(self, response: dict[str, Any]) -> list[Event]:
        """The events of a finished response, with each text as one delta."""
        events = self.begin()
        for item in response["output"]:
            text = item.get("arguments") or "".join(part["text"] for part in item.get("content", ()))
            logprobs = [logprob for part in item.get("content", ()) for logprob in part.get("logprobs") or ()]
            blank = {"arguments": ""} if item["type"] == "function_call" else {"content": []}
            events += self._begin_item(item["type"], {**item, **blank, "status": "in_progress"})
            events += (self._append_text(text, logprobs) if text else []) + self._close_item(item["status"])
        return events + self._finish(**response)

    def error_event(self, error: ForgearrError) -> Event:
        """The last event of a stream whose response could not be finished."""
        return self._event("error", code=error.code.lower(), message=error.message, param=None)

    def _feed_tool_call(self, delta: dict[str, Any]) -> list[Event]:
        function, events = delta.get("function", {}), list[Event]()
        if self._call_index != delta["index"]:
            events += self._close_item("completed")
            fields = {"call_id": delta.get("id") or f"call_{token_hex(12)}", "name": "", "arguments": ""}
            events += self._begin_item("function_call", fields | {"name": function.get("name", "")})
            self._call_index = delta["index"]
        if arguments := function.get("arguments"):
            events += self._append_text(arguments)
        return events

    def _advance(self, kind: str) -> list[Event]:
        """Continue the open item if it is of this kind, otherwise close it and begin a new one."""
        if self._is_item_open and self._item["type"] == kind:
            return []
        return self._close_item("completed") + self._begin_item(kind)

    def _begin_item(self, kind: str, fields: Item | None = None) -> list[Event]:
        output = self.response["output"]
        identifier = item_id(self.response["id"], kind, self._items_before + len(output))
        item: Item = {"id": identifier, "type": kind, "status": "in_progress"}
        if kind == "message":
            item |= {"role": "assistant", "content": []}
        if kind == "reasoning":
            item |= {"summary": [], "content": []}
        output.append(item | (fields or {}))
        self._is_item_open = True
        events = [self._item_event("response.output_item.added", item=deepcopy(self._item))]
        if kind != "function_call":
            part: Item = {"type": "reasoning_text", "text": ""}
            if kind == "message":
                part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self._item["content"].append(part)
            events.append(self._part_event("response.content_part.added", part=deepcopy(part)))
        return events

    def _append_text(self, text: str, logprobs: list[Item] | None = None) -> list[Event]:
        item = self._item
        if item["type"] == "function_call":
            item["arguments"] += text
            return [self._content_event("response.function_call_arguments.delta", delta=text)]
        part = item["content"][0]
        part["text"] += text
        if item["type"] == "reasoning":
            return [self._part_event("response.reasoning_text.delta", delta=text)]
        part["logprobs"] += logprobs or []
        return [self._part_event("response.output_text.delta", delta=text, logprobs=logprobs or [])]

    def _close_item(self, status: str) -> list[Event]:
        if not self._is_item_open:
            return []
        item = self._item
        item["status"] = status
        if item["type"] == "function_call":
            fields = {"name": item["name"], "arguments": item["arguments"]}
            events = [self._content_event("response.function_call_arguments.done", **fields)]
        else:
            part = deepcopy(item["content"][0])
            extra = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
            kind = "response.output_text.done" if item["type"] == "message" else "response.reasoning_text.done"
            events = [
                self._part_event(kind, text=part["text"], **extra),
                self._part_event("response.content_part.done", part=part),
            ]
        events.append(self._item_event("response.output_item.done", item=deepcopy(item)))
        self._is_item_open, self._call_index = False, None
        return events

    def _finish(self, status: str, **fields: Any) -> list[Event]:
        self.response |= {**fields, "status": status}
        return [self._event(END_EVENTS.get(status, "response.incomplete"), response=self._snapshot())]

    @property
    def _item(self) -> Item:
        return self.response["output"][-1]

    def _usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        input_tokens, output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        has_reasoning = any(item["type"] == "reasoning" for item in self.response["output"])
        return {
            "input_tokens": input_tokens,
            "input_tokens_details": {
                "cached_tokens": cached_tokens,
                "cache_write_tokens": input_tokens - cached_tokens,
            },
            "output_tokens": output_tokens,
            "output_tokens_details": {"reasoning_tokens": None if has_reasoning else 0},
            "total_tokens": usage["total_tokens"],
        }

    def _snapshot(self) -> dict[str, Any]:
        return {**self.response, "output": list(self.response["output"])}

    def _part_event(self, kind: str, **fields: Any) -> Event:
        return self._content_event(kind, content_index=0, **fields)

    def _content_event(self, kind: str, **fields: Any) -> Event:
        return self._item_event(kind, item_id=self._item["id"], **fields)

    def _item_event(self, kind: str, **fields: Any) -> Event:
        return self._event(kind, output_index=len(self.response["output"]) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._events, **fields}
        self._events += 1
        return event


def _logprobs(choice: dict[str, Any]) -> list[Item]:
    logprobs = (choice.get("logprobs") or {}).get("content") or []
    return [
        _token_fields(token) | {"top_logprobs": [_token_fields(top) for top in token["top_logprobs"]]}
        for token in logprobs
    ]


def _token_fields(logprob: dict[str, Any]) -> Item:
    return {name: logprob[name] for name in TOKEN_FIELDS}
