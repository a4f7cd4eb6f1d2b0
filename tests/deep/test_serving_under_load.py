"""Serving under load on a whole platform: many streams, slow readers, disconnects, and invalid requests."""

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
"""The options of a request whose response has some megabytes."""


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    settings = {"engines.slots": SLOTS, "engines.queue": QUEUE, "engines.context": CONTEXT}
    with running_platform({name: str(value) for name, value in settings.items()}) as platform:
        platform.wait_for_mlflow()
        yield platform


@pytest.fixture(scope="module")
def endless_model(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that never ends its answer."""
    folder = tmp_path_factory.mktemp("models")
    return register_model(
        platform.mlflow_url, folder, write_model(folder / "1.gguf", seed=1, talkative=True, context=CONTEXT)
    )


def build_request(model: str, tokens: int | None = None, **options: Any) -> dict[str, Any]:
    request = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "temperature": 0, **options}
    return request if tokens is None else {**request, "max_tokens": tokens}


def ask(platform: Platform, model: str, **options: Any) -> httpx.Response:
    return platform.http.post("/v1/chat/completions", json=build_request(model, **options), timeout=TIMEOUT)


def test_200_concurrent_streams_are_completed_or_refused(platform: Platform, endless_model: str) -> None:
    """A refused client gets a response that it can retry."""

    async def stream(client: httpx.AsyncClient) -> str:
        async with client.stream(
            "POST", "/v1/chat/completions", json=build_request(endless_model, TOKENS, stream=True)
        ) as response:
            body = (await response.aread()).decode()
        if response.is_success:
            assert body.endswith("data: [DONE]\n\n"), body[-300:]
            assert '"finish_reason":"length"' in body
            return "answered"
        assert response.status_code == httpx.codes.SERVICE_UNAVAILABLE, body
        assert response.headers["retry-after"]
        return json.loads(body)["error"]["code"]

    async def all_at_once() -> Counter[str]:
        limits = httpx.Limits(max_connections=STREAMS)
        async with httpx.AsyncClient(base_url=platform.url, timeout=TIMEOUT, limits=limits) as client:
            return Counter(await asyncio.gather(*(stream(client) for _ in range(STREAMS))))

    assert ask(platform, endless_model, tokens=1).is_success  # the model is loaded
    outcomes = asyncio.run(all_at_once())
    assert outcomes.total() == STREAMS
    assert outcomes.keys() <= {"answered", "engine_busy"}
    assert outcomes["answered"] >= SLOTS + QUEUE
    assert ask(platform, endless_model, tokens=1).is_success


def test_slow_readers_do_not_block_other_requests(platform: Platform, endless_model: str) -> None:
    """There are as many slow readers as slots, each with a long answer."""
    slow = [open_stream(platform, build_request(endless_model, **UNREAD)) for _ in range(SLOTS)]
    try:
        for reader in slow:
            assert reader.recv(1)
        with ThreadPoolExecutor(SLOTS) as threads:
            requests = [threads.submit(ask, platform, endless_model, tokens=TOKENS) for _ in range(5 * SLOTS)]
        assert all(request.result().is_success for request in requests)
        rest = read_all(slow[0])
        assert b'"finish_reason":"length"' in rest
        assert b"data: [DONE]" in rest
    finally:
        for reader in slow:
            reader.close()


def test_a_disconnected_client_frees_its_slot(platform: Platform, endless_model: str) -> None:
    """The longest possible answers would occupy all slots for minutes."""
    for _ in range(3):
        active = [open_stream(platform, build_request(endless_model, stream=True)) for _ in range(SLOTS)]
        assert all(reader.recv(1) for reader in active)
        waiting = [open_stream(platform, build_request(endless_model, stream=True)) for _ in range(QUEUE)]
        for reader in [*active, *waiting]:
            reader.close()
        eventually(lambda: ask(platform, endless_model, tokens=1).is_success, seconds=60)
    loaded = platform.http.get("/api/ps").json()["models"]
    assert [model["name"] for model in loaded] == [f"{endless_model}:v1"]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"messages": [{"role": "user", "content": "word " * 2_000_000}]}, "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "word " * CONTEXT}]}, "context_length_exceeded"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#/x"}}}}, None),
        ({"grammar": 'root ::= root "a" | "b"'}, None),
    ],
)
def test_an_invalid_request_is_refused_and_the_model_stays_loaded(
    platform: Platform, endless_model: str, options: dict[str, Any], code: str | None
) -> None:
    refused = ask(platform, endless_model, **options)
    assert refused.status_code == httpx.codes.BAD_REQUEST, refused.text[:500]
    assert refused.json()["error"]["code"] == (code or "request_refused")
    assert ask(platform, endless_model, tokens=1).is_success


def test_an_endless_schema_is_limited_by_max_tokens(platform: Platform, endless_model: str) -> None:
    lists = {"$defs": {"list": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/list"}}}}
    schema = {"name": "lists", "schema": {**lists, "$ref": "#/$defs/list"}}
    response = ask(platform, endless_model, tokens=500, response_format={"type": "json_schema", "json_schema": schema})
    assert response.is_success, response.text
    (choice,) = response.json()["choices"]
    assert choice["finish_reason"] == "length"
    assert set(choice["message"]["content"]) <= set("[ \n\t")


def open_stream(platform: Platform, body: dict[str, Any]) -> socket.socket:
    """Send a request over a socket, from which the test reads the response as slowly as it likes."""
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


def test_a_truncated_model_fails_only_its_own_requests(platform: Platform, endless_model: str, tmp_path: Path) -> None:
    """The file ends in the middle of its weights. Requests to other models still succeed."""
    complete = write_model(tmp_path / "whole.gguf", seed=2)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(complete.read_bytes()[: complete.stat().st_size * 2 // 3])
    name = register_model(platform.mlflow_url, tmp_path, broken)
    refused = ask(platform, name, tokens=1)
    assert (refused.status_code, refused.json()["error"]["code"]) == (500, "model_unreadable"), refused.text
    assert ask(platform, endless_model, tokens=1).is_success
