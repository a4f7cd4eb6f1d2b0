"""Files and uploads, through the official client."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import func, select, update

from cluster import identity, storage
from cluster.db import Database, now
from cluster.files import store as file_store
from cluster.files import uploads as file_uploads
from cluster.files.tables import File, Upload, UploadPart
from cluster.ownership import LOCAL
from cluster.settings import get_settings
from serve.app import create_app
from tests.support.api_client import add_users
from tests.support.app_server import running_app
from tests.support.waiting import TIMEOUT

SAMPLE = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good evening."}]}
PAIR = {
    "input": {"messages": [{"role": "user", "content": "Hello"}]},
    "preferred_output": [{"role": "assistant", "content": "Good evening."}],
    "non_preferred_output": [{"role": "assistant", "content": "What?"}],
}
REQUEST: dict[str, Any] = {"custom_id": "1", "method": "POST", "url": "/v1/embeddings", "body": {"model": "homelab"}}


class Gateway:
    """A gateway that requires credentials, and clients of several users."""

    def __init__(self, url: str, database: Database, users: dict[str, identity.User]) -> None:
        self.url = url
        self.database = database
        self.tokens = {name: identity.create_access_token(user) for name, user in users.items()}
        self.clients = {
            name: openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0)
            for name, token in self.tokens.items()
        }
        self.ada, self.bob, self.admin = (self.clients[name] for name in ("ada", "bob", "admin"))

    async def expire(self, row: type[File | Upload], identifier: str) -> None:
        """Set the expiry of a row to the past."""
        async with self.database.transaction() as session:
            expired = update(row).where(row.id == identifier).values(expires_at=now() - timedelta(seconds=1))
            await session.execute(expired)

    async def count(self, row: type[Any]) -> int:
        async with self.database.read_transaction() as session:
            return await session.scalar(select(func.count()).select_from(row)) or 0


@pytest.fixture
async def gateway(database: Database, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gateway]:
    monkeypatch.setenv("FORGEARR_AUTH__REQUIRED", "true")
    monkeypatch.setenv("FORGEARR_LIMITS__ENABLED", "false")
    monkeypatch.setenv("FORGEARR_FILES__MAX_MB", "1")
    monkeypatch.setenv("FORGEARR_FILES__MAX_UPLOAD_MB", "2")
    get_settings.cache_clear()
    users = await add_users(database)
    async with running_app(create_app()) as address:
        gateway = Gateway(f"http://{address}", database, users)
        yield gateway
        for client in gateway.clients.values():
            await client.close()


# Files


@pytest.mark.usefixtures("any_storage")
async def test_a_file_is_created_read_and_deleted(gateway: Gateway, tmp_path: Path) -> None:
    path = tmp_path / "größe.bin"
    path.write_bytes(bytes(range(256)) * 1000)
    file = await gateway.ada.files.create(file=path, purpose="user_data")
    assert (file.bytes, file.filename, file.purpose, file.object) == (256_000, "größe.bin", "user_data", "file")
    assert (file.status, file.status_details, file.expires_at) == ("processed", None, None)
    assert abs(file.created_at - now().timestamp()) < 60
    assert await gateway.ada.files.retrieve(file.id) == file
    content = await gateway.ada.files.content(file.id)
    assert content.content == path.read_bytes()
    assert content.response.headers["content-type"] == "application/octet-stream"
    assert content.response.headers["content-disposition"].startswith("attachment")

    deleted = await gateway.ada.files.delete(file.id)
    assert (deleted.id, deleted.deleted) == (file.id, True)
    with pytest.raises(openai.NotFoundError, match="There is no file"):
        await gateway.ada.files.retrieve(file.id)
    assert (await gateway.count(File), stored("files")) == (0, [])


async def test_the_synchronous_client(gateway: Gateway) -> None:
    def use_client() -> tuple[bytes, list[str]]:
        with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.tokens["ada"]) as client:
            created = client.files.create(file=("a.jsonl", lines(SAMPLE)), purpose="fine-tune")
            waited = client.files.wait_for_processing(created.id)
            listed = [file.id for file in client.files.list() if file.id == waited.id]
            return client.files.content(created.id).read(), listed

    content, listed = await asyncio.to_thread(use_client)
    assert (content, len(listed)) == (lines(SAMPLE), 1)


@pytest.mark.parametrize(
    ("purpose", "content", "kind"),
    [
        ("fine-tune", [SAMPLE, SAMPLE], "chat"),
        ("fine-tune", [PAIR], "preference"),
        ("batch", [REQUEST, REQUEST | {"custom_id": "2"}], "batch"),
    ],
)
async def test_a_valid_file_is_processed(gateway: Gateway, purpose: Any, content: list[Any], kind: str) -> None:
    file = await gateway.ada.files.create(file=("a.jsonl", lines(*content)), purpose=purpose)
    assert (file.status, file.status_details) == ("processed", None)
    async with gateway.database.read_transaction() as session:
        assert (await file_store.find(session, file.id, LOCAL)).content == kind


@pytest.mark.parametrize(
    ("purpose", "content", "message"),
    [
        ("fine-tune", b"", "There is no sample in a.jsonl"),
        ("fine-tune", b"\n\nhello\n", "line 3 of a.jsonl is not JSON"),
        ("fine-tune", json.dumps(SAMPLE).encode() + b'\n{"messages": []}', "line 2 of a.jsonl is not a valid sample"),
        ("fine-tune", b"\xff\xfe", "line 1 of a.jsonl is not JSON"),
        ("fine-tune", json.dumps(SAMPLE).encode() + b"\n" + json.dumps(PAIR).encode(), "line 2 of a.jsonl is pref"),
        ("batch", b"\n", "There is no request in a.jsonl"),
        (
            "batch",
            json.dumps(REQUEST | {"method": "GET"}).encode(),
            "line 1 of a.jsonl is not a valid request .*: method",
        ),
        (
            "batch",
            json.dumps(REQUEST | {"url": "/v1/files"}).encode(),
            "line 1 of a.jsonl is not a valid request .*: url",
        ),
        ("batch", json.dumps(REQUEST | {"body": []}).encode(), "line 1 of a.jsonl is not a valid request .*: body"),
        (
            "batch",
            json.dumps({"custom_id": "1"}).encode(),
            "line 1 of a.jsonl is not a valid request .*: method: Field requ",
        ),
        ("batch", json.dumps(REQUEST).encode() * 1 + b"\n\n" + json.dumps(REQUEST).encode(), "line 3 .* of line 1"),
    ],
)
async def test_an_invalid_file_names_the_wrong_line(
    gateway: Gateway, purpose: Any, content: bytes, message: str
) -> None:
    file = await gateway.ada.files.create(file=("a.jsonl", content), purpose=purpose)
    assert file.status == "error"
    assert file.status_details is not None
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(file.status_details)
    assert (await gateway.ada.files.content(file.id)).content == content


@pytest.mark.both_databases
async def test_files_are_paginated(gateway: Gateway) -> None:
    created = [await gateway.ada.files.create(file=(f"{n}.txt", b"x"), purpose="user_data") for n in range(5)]
    created.append(await gateway.ada.files.create(file=("b.jsonl", lines(REQUEST)), purpose="batch"))
    newest_first = [file.id for file in reversed(created)]
    page = await gateway.ada.files.list(limit=4)
    assert ([file.id for file in page.data], page.has_more) == (newest_first[:4], True)
    assert [file.id async for file in gateway.ada.files.list(limit=2)] == newest_first
    assert [file.id async for file in gateway.ada.files.list(limit=2, order="asc")] == newest_first[::-1]
    assert [file.id async for file in gateway.ada.files.list(purpose="batch")] == newest_first[:1]
    assert [file.id async for file in gateway.ada.files.list(after=newest_first[3])] == newest_first[4:]
    assert [file.id async for file in gateway.ada.files.list(after=newest_first[-1])] == []
    with pytest.raises(openai.NotFoundError):
        await gateway.ada.files.list(after="file-unknown")
    for limit in (0, 10_001):
        with pytest.raises(openai.UnprocessableEntityError):
            await gateway.ada.files.list(limit=limit)


@pytest.mark.both_databases
async def test_a_file_belongs_to_its_owner(gateway: Gateway) -> None:
    created = await gateway.ada.files.create(file=("a.txt", b"mine"), purpose="user_data")
    for attempt in (gateway.bob.files.retrieve, gateway.bob.files.content, gateway.bob.files.delete):
        with pytest.raises(openai.NotFoundError):
            await attempt(created.id)
    with pytest.raises(openai.NotFoundError):
        await gateway.bob.files.list(after=created.id)
    assert [file async for file in gateway.bob.files.list()] == []
    assert [file.id async for file in gateway.admin.files.list()] == [created.id]
    assert (await gateway.admin.files.content(created.id)).content == b"mine"


async def test_invalid_requests_are_refused(gateway: Gateway) -> None:
    create: Any = gateway.ada.files.create
    file = ("a.txt", b"x")
    refused: list[dict[str, Any]] = [
        {"file": file, "purpose": "assistants"},
        {"file": file, "purpose": "batch_output"},
        {"file": file, "purpose": "user_data", "expires_after": {"anchor": "created_at", "seconds": 10}},
        {"file": file, "purpose": "user_data", "expires_after": {"anchor": "last_active_at", "seconds": 3600}},
        {"file": file, "purpose": "user_data", "extra_body": {"colour": "red"}},
        {"file": ("x" * 501, b"x"), "purpose": "user_data"},
    ]
    for options in refused:
        with pytest.raises(openai.UnprocessableEntityError):
            await create(**options)
    with pytest.raises(openai.APIStatusError, match="larger than"):
        await create(file=("a.bin", b"x" * 3_000_000), purpose="user_data")
    async with httpx.AsyncClient(base_url=gateway.url, headers=bearer(gateway, "ada"), timeout=TIMEOUT) as http:
        bodies: list[tuple[dict[str, Any], int]] = [
            ({"json": {"purpose": "batch"}}, 400),
            ({"data": {"purpose": "user_data", "file": "x"}, "files": {"other": b"x"}}, 422),
            ({"files": [("file", file), ("file", file)], "data": {"purpose": "user_data"}}, 400),
            ({"content": b"no form", "headers": {"content-type": "multipart/form-data"}}, 400),
            ({"content": b"no form", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400),
        ]
        for body, status in bodies:
            response = await http.post("/v1/files", **body)
            assert (response.status_code, "error" in response.json()) == (status, True), response.text
    assert (await gateway.count(File), stored("files")) == (0, [])


@pytest.mark.both_databases
async def test_an_expired_file_is_removed(gateway: Gateway) -> None:
    create: Any = gateway.ada.files.create
    lasting = await create(file=("a.txt", b"x"), purpose="user_data")
    in_an_hour = {"anchor": "created_at", "seconds": 3600}
    expiring = await create(file=("b.txt", b"x"), purpose="user_data", expires_after=in_an_hour)
    assert expiring.expires_at == expiring.created_at + 3600
    batch = await create(file=("b.jsonl", lines(REQUEST)), purpose="batch")
    assert batch.expires_at == batch.created_at + 30 * 24 * 3600

    await gateway.expire(File, expiring.id)
    with pytest.raises(openai.NotFoundError):
        await gateway.ada.files.retrieve(expiring.id)
    assert {file.id async for file in gateway.ada.files.list()} == {lasting.id, batch.id}
    assert len(stored("files")) == 3
    assert await file_store.remove_expired(gateway.database) == 1
    assert (await gateway.count(File), len(stored("files"))) == (2, 2)


async def test_a_repeated_job_finds_the_file_of_its_first_attempt(gateway: Gateway, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"filename": "out.jsonl", "purpose": "batch_output", "file_id": "file-of-job"}
    first = await file_store.create_file(gateway.database, BytesIO(b"one\ntwo\n"), principal=LOCAL, **fields)
    again = await file_store.create_file(gateway.database, BytesIO(b"other"), principal=LOCAL, **fields)
    assert (first.id, again.bytes) == (again.id, 8)
    with file_store.open_file(again) as content:
        assert list(content) == [b"one\n", b"two\n"]


# Uploads


async def test_a_file_is_uploaded_in_parts(gateway: Gateway) -> None:
    content = lines(*[SAMPLE] * 200)
    upload = await gateway.ada.uploads.create(
        bytes=len(content), filename="a.jsonl", mime_type="application/jsonl", purpose="fine-tune"
    )
    assert (upload.status, upload.expires_at - upload.created_at, upload.file) == ("pending", 3600, None)
    send = gateway.ada.uploads.parts.create
    late = await send(upload.id, data=content[5000:])
    lost = await send(upload.id, data=content[:4000])
    early = await send(upload.id, data=content[:5000])
    for part_ids, md5 in (
        ([late.id], None),
        ([lost.id, late.id], None),
        ([early.id, early.id, late.id], None),
        ([early.id, "part_unknown"], None),
        ([early.id, late.id], "0" * 32),
    ):
        with pytest.raises(openai.BadRequestError):
            await gateway.ada.uploads.complete(upload.id, part_ids=part_ids, md5=md5 or openai.omit)
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    completed = await gateway.ada.uploads.complete(upload.id, part_ids=[early.id, late.id], md5=digest)
    assert completed.status == "completed"
    assert completed.file is not None
    assert (completed.file.status, completed.file.bytes, completed.file.filename) == (
        "processed",
        len(content),
        "a.jsonl",
    )
    assert (await gateway.ada.files.content(completed.file.id)).content == content
    assert (await gateway.count(UploadPart), stored("uploads")) == (0, [])
    for attempt in (send(upload.id, data=b"x"), gateway.ada.uploads.complete(upload.id, part_ids=[early.id])):
        with pytest.raises(openai.ConflictError, match="completed"):
            await attempt


async def test_the_client_uploads_a_file_in_chunks(gateway: Gateway, tmp_path: Path) -> None:
    path = tmp_path / "big.bin"
    path.write_bytes(bytes(range(250)) * 6000)

    def upload_file() -> Any:
        with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.tokens["ada"]) as client:
            return client.uploads.upload_file_chunked(
                file=path, mime_type="application/octet-stream", purpose="user_data", part_size=400_000
            )

    completed = await asyncio.to_thread(upload_file)
    assert (await gateway.ada.files.content(completed.file.id)).content == path.read_bytes()


async def test_an_upload_of_invalid_samples_makes_a_file_with_an_error(gateway: Gateway) -> None:
    upload = await gateway.ada.uploads.create(bytes=5, filename="a.jsonl", mime_type="text/plain", purpose="fine-tune")
    part = await gateway.ada.uploads.parts.create(upload.id, data=b"hello")
    completed = await gateway.ada.uploads.complete(upload.id, part_ids=[part.id])
    assert completed.file is not None
    assert (completed.file.status, "line 1 of a.jsonl" in (completed.file.status_details or "")) == ("error", True)


async def test_an_upload_can_be_cancelled(gateway: Gateway) -> None:
    upload = await begin_upload(gateway)
    await gateway.ada.uploads.parts.create(upload.id, data=b"x" * 100)
    assert (await gateway.ada.uploads.cancel(upload.id)).status == "cancelled"
    assert (await gateway.count(UploadPart), stored("uploads")) == (0, [])
    with pytest.raises(openai.ConflictError, match="cancelled"):
        await gateway.ada.uploads.parts.create(upload.id, data=b"x")
    assert stored("uploads") == []


async def test_an_upload_expires_after_an_hour(gateway: Gateway) -> None:
    upload = await begin_upload(gateway)
    part = await gateway.ada.uploads.parts.create(upload.id, data=b"x" * 100)
    await gateway.expire(Upload, upload.id)
    with pytest.raises(openai.ConflictError, match="expired"):
        await gateway.ada.uploads.complete(upload.id, part_ids=[part.id])
    assert await file_uploads.remove_expired(gateway.database) == 1
    assert (await gateway.count(UploadPart), stored("uploads")) == (0, [])
    assert await file_uploads.remove_expired(gateway.database) == 0


async def test_an_upload_belongs_to_its_owner_and_has_a_size_limit(gateway: Gateway) -> None:
    upload = await begin_upload(gateway)
    for attempt in (
        gateway.bob.uploads.parts.create(upload.id, data=b"x"),
        gateway.bob.uploads.complete(upload.id, part_ids=["part_x"]),
        gateway.bob.uploads.cancel(upload.id),
    ):
        with pytest.raises(openai.NotFoundError):
            await attempt
    with pytest.raises(openai.BadRequestError, match="more than 2 times"):
        await gateway.ada.uploads.parts.create(upload.id, data=b"x" * 201)
    assert stored("uploads") == []
    with pytest.raises(openai.APIStatusError, match="2 MiB"):
        await gateway.ada.uploads.create(bytes=3_000_000, filename="a", mime_type="a", purpose="user_data")
    create: Any = gateway.ada.uploads.create
    with pytest.raises(openai.UnprocessableEntityError):
        await create(bytes=1, filename="a", mime_type="a", purpose="vision")


@pytest.mark.both_databases
async def test_simultaneous_completions_of_an_upload_make_one_file(gateway: Gateway) -> None:
    upload = await begin_upload(gateway)
    part = await gateway.ada.uploads.parts.create(upload.id, data=b"x" * 100)
    outcomes = await asyncio.gather(
        *(gateway.ada.uploads.complete(upload.id, part_ids=[part.id]) for _ in range(4)), return_exceptions=True
    )
    refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert len(refused) == 3
    assert all(isinstance(error, openai.ConflictError) for error in refused)
    assert (await gateway.count(File), len(stored("files"))) == (1, 1)


async def begin_upload(gateway: Gateway) -> Any:
    return await gateway.ada.uploads.create(bytes=100, filename="a.txt", mime_type="text/plain", purpose="user_data")


def bearer(gateway: Gateway, name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {gateway.tokens[name]}"}


def lines(*documents: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(document).encode() + b"\n" for document in documents)


def stored(folder: str) -> list[str]:
    """The names of the stored files in a folder."""
    root = Path(storage.address(folder))
    return [path.name for path in root.rglob("*") if path.is_file()]
