"""API4:2023, unrestricted resource consumption: what a single request may take from all others."""

import hashlib
import hmac
import json
import threading
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import orjson
import pytest
from fastapi.routing import APIRoute
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event
from starlette.types import Message

from cluster.db import Database
from cluster.settings import get_settings
from jobs.tables import Job
from serve.http import json_body
from serve.http.json_body import MAX_BYTES_ON_LOOP, MAX_VALUES, TooManyValues, ValueCounter
from serve.http.long_values import MAX_CHARACTERS
from serve.http.marks import access_of
from serve.http.mounts import methods_of
from serve.middleware.strict_input import MAX_ANONYMOUS_BODY_BYTES, MAX_SIGNED_BODY_BYTES
from serve.routes import MOUNTS
from tests.support.api_client import ApiClient

JSON = {"Content-Type": "application/json"}
MEBIBYTE = 1024 * 1024
FOR_USERS = sorted(
    (method, route.path_format)
    for mount in MOUNTS
    for route in mount.routes
    if isinstance(route, APIRoute) and access_of(route) in {"user", "admin"}
    for method in methods_of(route) - {"GET", "HEAD"}
)
LISTS = b"[" + b"[]," * (MEBIBYTE // 3) + b"[]]"


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Every document that orjson parses, by its length and whether that is in the thread of the event loop."""
    found: list[tuple[int, bool]] = []
    loads = orjson.loads

    def record(document: bytes | str) -> Any:
        found.append((len(document), threading.current_thread() is threading.main_thread()))
        return loads(document)

    monkeypatch.setattr(orjson, "loads", record)
    return found


# Bodies of strangers


async def test_fill_the_memory_without_a_credential(api: ApiClient) -> None:
    """The response comes before the first byte of the body is read."""
    reads = 0

    async def receive() -> Message:
        nonlocal reads
        reads += 1
        return {"type": "http.request", "body": b"[]," * 1000, "more_body": True}

    assert len(FOR_USERS) > 50
    for method, path in FOR_USERS:
        for headers in ([], [(b"content-length", b"4194304")], [(b"transfer-encoding", b"chunked")]):
            assert await status_of(api, method, path, receive, headers) == 401, path
    assert reads == 0


async def test_have_a_long_login_parsed(api: ApiClient, parsed: list[tuple[int, bool]]) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 3000
            yield b"[]," * 1000

    for path in ("login", "refresh", "logout", "register"):
        announced = await api.http.post(f"/api/v1/auth/{path}", content=LISTS, headers=JSON)
        assert (announced.status_code, announced.json()["error_code"]) == (413, "BODY_TOO_LARGE")
    streamed = await api.http.post("/api/v1/auth/login", content=endless(), headers=JSON)
    assert streamed.status_code == 413
    assert sent <= MAX_ANONYMOUS_BODY_BYTES + 3000
    assert parsed == []


async def test_have_an_unsigned_webhook_parsed(api: ApiClient, parsed: list[tuple[int, bool]]) -> None:
    repository = {"name": "work", "url": "https://git.example.com/ada/work", "webhook_secret": "a secret of webhooks"}
    assert (await api.request("admin", "POST", "/api/v1/repos", json=repository)).status_code == 201
    parsed.clear()
    fields = b"a=1&" * MEBIBYTE
    for body, content_type in ((LISTS, "application/json"), (fields, "application/x-www-form-urlencoded")):
        for provider in ("github", "gitea", "gitlab"):
            for query in ("", "?repository=work"):
                response = await api.http.post(
                    f"/webhooks/{provider}{query}",
                    content=body,
                    headers={"Content-Type": content_type, "X-Hub-Signature-256": f"sha256={'0' * 64}"},
                )
                assert (response.status_code, response.json()["error_code"]) == (401, "WEBHOOK_REFUSED")
    too_long = await api.http.post("/webhooks/github", content=b" " * (MAX_SIGNED_BODY_BYTES + 1), headers=JSON)
    assert too_long.status_code == 413
    assert parsed == []


async def test_stop_the_server_with_a_signed_webhook(api: ApiClient, parsed: list[tuple[int, bool]]) -> None:
    secret = "a secret of webhooks"
    repository = {"name": "work", "url": "https://git.example.com/ada/work", "webhook_secret": secret}
    assert (await api.request("admin", "POST", "/api/v1/repos", json=repository)).status_code == 201
    parsed.clear()

    async def deliver(body: bytes, content_type: str) -> int:
        signature = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
        headers = {"X-GitHub-Event": "push", "X-Hub-Signature-256": f"sha256={signature}", "Content-Type": content_type}
        return (await api.http.post("/webhooks/github?repository=work", content=body, headers=headers)).status_code

    assert await deliver(LISTS, "application/json") == 413
    assert await deliver(b"payload=" + LISTS, "application/x-www-form-urlencoded") == 413
    assert parsed == []
    assert await deliver(b"a=1&" * 11 + b"payload={}", "application/x-www-form-urlencoded") == 202
    assert await deliver(b'{"ref": "refs/heads/main"}', "application/json") == 202
    assert [is_loop for _, is_loop in parsed] == [False, False]


# Bodies of users


async def test_stop_the_server_with_many_small_values(api: ApiClient, parsed: list[tuple[int, bool]]) -> None:
    bodies = {
        "lists": b"[" * 50 + LISTS + b"]" * 50,
        "numbers": b"[" + b"1," * MAX_VALUES + b"1]",
        "objects": b"[" + b"{}," * MAX_VALUES + b"{}]",
        "fields": b"{" + b",".join(b'"%d":1' % number for number in range(MAX_VALUES + 1)) + b"}",
        "strings": b"[" + rb'"\"",' * MAX_VALUES + b'""]',
    }
    for name, body in bodies.items():
        response = await api.request("ada", "POST", "/api/v1/jobs", content=body)
        assert (response.status_code, response.json()["error_code"]) == (413, "TOO_MANY_VALUES"), name
    assert parsed == []


async def test_text_is_not_mistaken_for_values(api: ApiClient) -> None:
    text = ',[{"\\' * (MAX_VALUES // 2)
    job = {"kind": "probe", "spec": {"payload": text}}
    assert (await api.request("ada", "POST", "/api/v1/jobs", json=job)).status_code == 201


async def test_a_long_document_is_parsed_once_and_off_the_event_loop(
    api: ApiClient, parsed: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    json_lengths: list[int] = []
    json_loads = json.loads

    def record(text: bytes | str, **options: Any) -> Any:
        json_lengths.append(len(text))
        return json_loads(text, **options)

    monkeypatch.setattr(json, "loads", record)
    for size in (10, MAX_BYTES_ON_LOOP):
        job = {"kind": "probe", "spec": {"payload": "x" * size}}
        assert (await api.request("ada", "POST", "/api/v1/jobs", json=job)).status_code == 201
    assert [is_loop for _, is_loop in parsed] == [True, False]
    assert [length for length in json_lengths if length > MAX_BYTES_ON_LOOP] == []


async def test_fill_a_response_with_ones_own_mistakes(api: ApiClient) -> None:
    session = await api.create_session()
    named = await api.start_session(session, prompt_ids=["x"] * 900)
    assert (named.status_code, len(named.json()["details"])) == (422, 20)
    assert "and 880 more" in named.json()["message"]
    job = {"kind": "fine_tune", "spec": {"data": {"prompts": {"ids": ["x"] * 50_000}}}}
    counted = [
        await api.start_session(session, prompt_ids=["x"] * 50_000),
        await api.request("ada", "POST", "/api/v1/jobs", json=job),
    ]
    for response in counted:
        assert (response.status_code, response.json()["details"]) == (422, {})
        assert "50,000 fields that are not valid" in response.json()["message"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
)


@given(document=json_values, splits=st.lists(st.integers(0, 1000)), ascii_only=st.booleans())
def test_values_are_counted_exactly_and_in_any_parts(document: Any, splits: list[int], ascii_only: bool) -> None:
    text = json.dumps(document, ensure_ascii=ascii_only).encode()
    count = count_values(document)
    borders = [0, *sorted(split % (len(text) + 1) for split in splits), len(text)]
    parts = [text[begin:end] for begin, end in pairwise(borders)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_body, "MAX_VALUES", count)
        counter = ValueCounter()
        for part in parts:
            counter.add(part)
        patch.setattr(json_body, "MAX_VALUES", count - 1)
        with pytest.raises(TooManyValues):
            counter.add(b"")


def count_values(document: Any) -> int:
    """Each value, and the place for one in an empty list or object."""
    if isinstance(document, dict):
        return 1 + sum(count_values(value) for value in document.values()) if document else 2
    if isinstance(document, list):
        return 1 + sum(count_values(value) for value in document) if document else 2
    return 1


# Lists


@pytest.mark.both_databases
async def test_multiply_a_long_spec_by_listing_jobs(api: ApiClient) -> None:
    result = {"log": "y" * 990_000}
    ids = [await api.queue_job("probe", {"payload": "x" * 990_000}, result=result) for _ in range(3)]
    short = await api.queue_job("probe", {"payload": "x"}, result={"ok": True})
    response = await api.request("ada", "GET", "/api/v1/jobs")
    assert len(response.content) < 10_000
    listed = {job["id"]: job for job in response.json()["items"]}
    for job_id in ids:
        job = listed[job_id]
        assert (job["spec"], job["result"], job["truncated"]) == ({}, None, ["spec", "result"])
        whole = (await api.request("ada", "GET", f"/api/v1/jobs/{job_id}")).json()
        assert (len(whole["spec"]["payload"]), whole["result"], whole["truncated"]) == (990_000, result, [])
    assert listed[short]["spec"]["payload"] == "x"
    assert (listed[short]["result"], listed[short]["truncated"]) == ({"ok": True}, [])


@pytest.mark.both_databases
async def test_multiply_a_long_spec_by_listing_schedules(api: ApiClient) -> None:
    for name, size in (("long", 900_000), ("short", 10)):
        schedule = {"name": name, "kind": "probe", "cron": "0 3 * * *", "spec": {"payload": "x" * size}}
        created = await api.request("ada", "POST", "/api/v1/schedules", json=schedule)
        assert (created.status_code, created.json()["truncated"]) == (201, [])
    long, short = (await api.request("ada", "GET", "/api/v1/schedules")).json()["items"]
    assert (long["spec"], long["truncated"]) == ({}, ["spec"])
    assert (short["spec"]["payload"], short["truncated"]) == ("x" * 10, [])
    whole = (await api.request("ada", "GET", f"/api/v1/schedules/{long['id']}")).json()
    assert len(whole["spec"]["payload"]) == 900_000


@pytest.mark.both_databases
async def test_multiply_long_lists_of_prompts_by_listing_sessions(api: ApiClient) -> None:
    prompts = [await api.create_prompt() for _ in range(2)]
    session = await api.create_session()
    ids = prompts * MAX_CHARACTERS
    started = await api.start_session(session, prompt_ids=ids)
    assert (started.status_code, started.json()["prompt_ids"]) == (200, ids)
    await api.create_session(name="another")
    short, long = (await api.request("ada", "GET", "/api/training/sessions")).json()["items"]
    assert (long["id"], long["prompt_ids"], long["truncated"]) == (session, None, ["prompt_ids"])
    assert long["config"] == {"num_epochs": 4, "batch_size": 2}
    assert (short["prompt_ids"], short["truncated"]) == (None, [])
    whole = (await api.request("ada", "GET", f"/api/training/sessions/{session}")).json()
    assert (whole["prompt_ids"], whole["truncated"]) == (ids, [])


async def test_a_list_of_jobs_loads_no_long_value(api: ApiClient, database: Database) -> None:
    job_id = await api.queue_job("probe", {"payload": "x" * 100_000}, checkpoint={"done": "x" * 100_000})
    loaded: list[dict[str, Any]] = []

    @event.listens_for(Job, "load")
    def remember(job: Job, _: object) -> None:
        loaded.append(dict(vars(job)))

    try:
        await api.request("ada", "GET", "/api/v1/jobs")
    finally:
        event.remove(Job, "load", remember)
    assert [row["id"] for row in loaded] == [job_id]
    assert not {"spec", "result", "checkpoint"} & loaded[0].keys()


async def status_of(api: ApiClient, method: str, path: str, receive: Any, headers: list[tuple[bytes, bytes]]) -> int:
    """The status of a request whose body comes from `receive`."""
    scope = {
        "type": "http",
        "method": method,
        "path": path.replace("{", "").replace("}", ""),
        "raw_path": path.encode(),
        "scheme": "https",
        "query_string": b"",
        "root_path": "",
        "http_version": "1.1",
        "headers": [(b"host", b"api.example"), (b"content-type", b"application/json"), *headers],
        "client": ("192.0.2.1", 40000),
        "server": ("192.0.2.2", 443),
    }
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await api.app(scope, receive, send)
    return sent[0]["status"]


on_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


MORE_THAN_ANY_DISK_MB = 10**12


LARGE = b'{"text": "' + b"x" * 100_000 + b'"}\n'


DIGEST = hashlib.sha256(LARGE).hexdigest()


@pytest.fixture
def full_disk(api: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_STORAGE__MIN_FREE_MB", str(MORE_THAN_ANY_DISK_MB))
    get_settings.cache_clear()


@on_sqlite
@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/v1/files", {"files": {"file": ("a.jsonl", LARGE)}, "data": {"purpose": "user_data"}}),
        ("/v1/uploads/upload_1/parts", {"files": {"data": LARGE}}),
        ("/api/v1/datasets", {"content": LARGE}),
        (f"/api/blobs/sha256:{DIGEST}", {"content": LARGE}),
        ("/api/v1/jobs", {"json": {"kind": "probe", "spec": {"payload": {"text": "x" * 100_000}}}}),
        ("/v1/responses", {"json": {"model": "forgearr/tiny", "input": "x" * 100_000}}),
    ],
)
async def test_fill_the_last_of_the_disk(api: ApiClient, full_disk: None, path: str, content: dict[str, Any]) -> None:
    headers = {"Authorization": api.authorization("admin")}
    response = await api.http.post(path, headers=headers, **content)
    assert response.status_code == 507, response.text
    assert "have to stay free (storage.min_free_mb)" in response.text
    assert "GB are free" in response.text


@on_sqlite
async def test_send_without_a_length_what_fills_the_disk(api: ApiClient, full_disk: None) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield LARGE

    headers = {"Authorization": api.authorization("ada")}
    response = await api.http.post("/api/v1/datasets", headers=headers, content=chunks())
    assert response.status_code == 507


@on_sqlite
async def test_a_full_disk_does_not_keep_people_from_clearing_it(api: ApiClient, full_disk: None) -> None:
    job = await api.queue_job("probe", {})
    assert (await api.request("ada", "POST", f"/api/v1/jobs/{job}/cancel")).status_code == 200
    assert (await api.request("ada", "GET", "/api/v1/jobs")).status_code == 200
