"""Answers on a whole platform under load: many at once, readers that do not read, clients that leave, wild requests."""

import asyncio
import json
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.support.platform import Platform, running_platform
from tests.support.registry_model import register_model
from tests.support.small_models import write_model
from tests.support.waiting import TIMEOUT, eventually

pytestmark = [pytest.mark.platform, pytest.mark.deep]

SLOTS, QUEUE, STREAMS = 4, 64, 200
TOKENS = 32
CONTEXT = 65_536
UNREAD: dict[str, Any] = {"tokens": 1500, "logprobs": True, "top_logprobs": 20, "stream": True}
"""An answer of some megabytes."""


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    settings = {"engines.slots": SLOTS, "engines.queue": QUEUE, "engines.context": CONTEXT}
    with running_platform({name: str(value) for name, value in settings.items()}) as platform:
        platform.wait_for_mlflow()
        yield platform


@pytest.fixture(scope="module")
def talker(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that never ends an answer by itself."""
    folder = tmp_path_factory.mktemp("models")
    return register_model(
        platform.mlflow_url, folder, write_model(folder / "1.gguf", seed=1, talkative=True, context=CONTEXT)
    )


def asked(model: str, tokens: int | None = None, **more: Any) -> dict[str, Any]:
    said = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "temperature": 0, **more}
    return said if tokens is None else {**said, "max_tokens": tokens}


def ask(platform: Platform, model: str, **more: Any) -> httpx.Response:
    return platform.http.post("/v1/chat/completions", json=asked(model, **more), timeout=TIMEOUT)


def test_two_hundred_streams_at_once(platform: Platform, talker: str) -> None:
    """Each is answered to its end, or refused in a way that clients know to repeat."""

    async def stream(client: httpx.AsyncClient) -> str:
        async with client.stream("POST", "/v1/chat/completions", json=asked(talker, TOKENS, stream=True)) as answer:
            body = (await answer.aread()).decode()
        if answer.is_success:
            assert body.endswith("data: [DONE]\n\n"), body[-300:]
            assert '"finish_reason":"length"' in body
            return "answered"
        assert answer.status_code == httpx.codes.SERVICE_UNAVAILABLE, body
        assert answer.headers["retry-after"]
        return json.loads(body)["error"]["code"]

    async def all_at_once() -> Counter[str]:
        limits = httpx.Limits(max_connections=STREAMS)
        async with httpx.AsyncClient(base_url=platform.url, timeout=TIMEOUT, limits=limits) as client:
            return Counter(await asyncio.gather(*(stream(client) for _ in range(STREAMS))))

    assert ask(platform, talker, tokens=1).is_success  # it is loaded
    outcomes = asyncio.run(all_at_once())
    assert outcomes.total() == STREAMS
    assert outcomes.keys() <= {"answered", "engine_busy"}
    assert outcomes["answered"] >= SLOTS + QUEUE
    assert ask(platform, talker, tokens=1).is_success


def test_readers_that_do_not_read_keep_nobody_waiting(platform: Platform, talker: str) -> None:
    """As many of them as there are slots, each with a long answer."""
    slow = [open_stream(platform, asked(talker, **UNREAD)) for _ in range(SLOTS)]
    try:
        for reader in slow:
            assert reader.recv(1)
        with ThreadPoolExecutor(SLOTS) as threads:
            asking = [threads.submit(ask, platform, talker, tokens=TOKENS) for _ in range(5 * SLOTS)]
        assert all(one.result().is_success for one in asking)
        rest = read_all(slow[0])
        assert b'"finish_reason":"length"' in rest
        assert b"data: [DONE]" in rest
    finally:
        for reader in slow:
            reader.close()


def test_who_leaves_in_the_middle_makes_room(platform: Platform, talker: str) -> None:
    """The longest answers that there can be would hold every slot for minutes."""
    for _ in range(3):
        heard = [open_stream(platform, asked(talker, stream=True)) for _ in range(SLOTS)]
        assert all(reader.recv(1) for reader in heard)
        waiting = [open_stream(platform, asked(talker, stream=True)) for _ in range(QUEUE)]
        for reader in [*heard, *waiting]:
            reader.close()
        eventually(lambda: ask(platform, talker, tokens=1).is_success, seconds=60)
    held = platform.http.get("/api/ps").json()["models"]
    assert [one["name"] for one in held] == [f"{talker}:v1"]


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"messages": [{"role": "user", "content": "word " * 2_000_000}]}, "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "word " * CONTEXT}]}, "context_length_exceeded"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#/x"}}}}, None),
        ({"grammar": 'root ::= root "a" | "b"'}, None),
    ],
)
def test_what_cannot_be_answered_is_refused_and_the_model_stays(
    platform: Platform, talker: str, more: dict[str, Any], code: str | None
) -> None:
    refused = ask(platform, talker, **more)
    assert refused.status_code == httpx.codes.BAD_REQUEST, refused.text[:500]
    assert refused.json()["error"]["code"] == (code or "request_refused")
    assert ask(platform, talker, tokens=1).is_success


def test_a_schema_that_never_ends_ends_with_the_context(platform: Platform, talker: str) -> None:
    lists = {"$defs": {"list": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/list"}}}}
    schema = {"name": "lists", "schema": {**lists, "$ref": "#/$defs/list"}}
    answer = ask(platform, talker, tokens=500, response_format={"type": "json_schema", "json_schema": schema})
    assert answer.is_success, answer.text
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "length"
    assert set(choice["message"]["content"]) <= set("[ \n\t")


def open_stream(platform: Platform, body: dict[str, Any]) -> socket.socket:
    """A client that says what it wants, and then reads only what it is told to."""
    address = urlsplit(platform.url)
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    client = socket.create_connection((address.hostname or "", address.port or 0), timeout=TIMEOUT)
    client.sendall(head.encode() + content)
    return client


def read_all(client: socket.socket) -> bytes:
    parts: list[bytes] = []
    while part := client.recv(1 << 20):
        parts.append(part)
    return b"".join(parts)


def test_a_model_on_disk_is_not_harmed(platform: Platform, talker: str, tmp_path: Path) -> None:
    """A file that breaks off in the middle of its weights: its own requests fail, the others' go on."""
    whole = write_model(tmp_path / "whole.gguf", seed=2)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    name = register_model(platform.mlflow_url, tmp_path, broken)
    refused = ask(platform, name, tokens=1)
    assert (refused.status_code, refused.json()["error"]["code"]) == (500, "model_unreadable"), refused.text
    assert ask(platform, talker, tokens=1).is_success
