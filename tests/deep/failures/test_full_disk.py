"""The disk of an installation becomes full, behind the reserve of `storage.min_free_mb`, as by another program."""

import hashlib
import json
import sqlite3
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.platform import Platform, fill_disk, running_platform
from tests.support.waiting import eventually

pytestmark = [pytest.mark.platform, pytest.mark.deep]

DISK_MB = 160
FREE_BYTES = 4_000_000
MESSAGE = "x" * 100_000
SAMPLE = {"messages": [{"role": "user", "content": MESSAGE}, {"role": "assistant", "content": "Yes."}]}
SAMPLES = b"".join(json.dumps(SAMPLE).encode() + b"\n" for _ in range(100))
PROMPT = {"name": "Lights", "user_input": "Are the lights on?", "expected_output": "Yes."}
PROMPTS = b"".join(json.dumps({**PROMPT, "user_input": MESSAGE}).encode() + b"\n" for _ in range(100))
BLOB = hashlib.sha256(SAMPLES).hexdigest()
BOUNDARY = "forgearr-test-boundary"
FORM_TYPE = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


@pytest.fixture
def platform() -> Generator[Platform]:
    settings = {"mlflow.enabled": "false", "storage.min_free_mb": "0"}
    with running_platform(settings, disk_mb=DISK_MB) as platform:
        yield platform


def test_every_route_that_takes_bytes_says_that_the_disk_is_full_and_keeps_nothing(platform: Platform) -> None:
    upload = platform.http.post(
        "/v1/uploads",
        json={"filename": "a.txt", "purpose": "user_data", "bytes": len(SAMPLES), "mime_type": "text/plain"},
    ).json()["id"]
    large: dict[str, Callable[[], httpx.Response]] = {
        "a file": lambda: send_form(platform, "/v1/files", "file", SAMPLES),
        "a part of an upload": lambda: send_form(platform, f"/v1/uploads/{upload}/parts", "data", SAMPLES),
        "a dataset": lambda: send(platform, "/api/v1/datasets?name=large", SAMPLES),
        "a blob": lambda: send(platform, f"/api/blobs/sha256:{BLOB}", SAMPLES),
        "prompts": lambda: send(platform, "/api/training/prompts/import", PROMPTS),
    }
    small: dict[str, Callable[[], httpx.Response]] = {
        "a job": lambda: platform.http.post(
            "/api/v1/jobs", json={"kind": "probe", "spec": {"payload": MESSAGE[:9000]}}
        ),
        "a prompt": lambda: platform.http.post("/api/training/prompts", json={**PROMPT, "user_input": MESSAGE[:9000]}),
        "a file": lambda: send_form(platform, "/v1/files", "file", b"a few bytes"),
        "a dataset": lambda: send(platform, "/api/v1/datasets?name=small", SAMPLES[: SAMPLES.index(b"\n") + 1]),
    }
    running = platform.submit(spec={"steps": 20, "seconds": 20})
    platform.wait_for(running, "running")
    filler = platform.home / "filler"
    before = state(platform)

    fill_disk(filler, FREE_BYTES)
    for name, request in large.items():
        assert_disk_full(name, request())
        assert state(platform) == before, name
    for name, request in small.items():
        known, response = until_refused(platform, request, filler)
        assert_disk_full(name, response)
        assert state(platform) == known, name

    filler.unlink()
    for name, request in {**large, **small}.items():
        response = request()
        assert response.is_success, f"{name}: {response.text}"
    assert platform.wait_for(running)["state"] == "succeeded"
    job = platform.wait_for(platform.submit())
    assert job["state"] == "succeeded", job["error"]
    with sqlite3.connect(platform.home / "forgearr.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def state(platform: Platform) -> dict[str, Any]:
    """What the platform has stored, by its files and by its answers. The database answers also while it is full."""
    lists = ("/api/v1/jobs", "/v1/files", "/api/v1/datasets", "/api/training/prompts")
    answers = {path: platform.http.get(path, params={"limit": 100}) for path in lists}
    assert {path: answer.status_code for path, answer in answers.items()} == dict.fromkeys(lists, 200)
    stored = platform.home / "storage"
    counts = {path: len(answer.json().get("items", answer.json().get("data"))) for path, answer in answers.items()}
    return {**counts, "files": sorted(str(file) for file in stored.rglob("*") if file.is_file())}


def until_refused(
    platform: Platform, request: Callable[[], httpx.Response], filler: Path
) -> tuple[dict[str, Any], httpx.Response]:
    """Repeat a request, which may still find room inside of the database's files, until it is refused.

    Returns the state before it, and the response.
    """

    def refused() -> tuple[dict[str, Any], httpx.Response] | None:
        fill_disk(filler)
        known = state(platform)
        response = request()
        return (known, response) if response.is_error else None

    return eventually(refused)


def assert_disk_full(name: str, response: httpx.Response) -> None:
    assert response.status_code == 507, f"{name}: {response.status_code} {response.text}"
    assert "disk" in response.text or "space" in response.text, response.text


def send(platform: Platform, path: str, content: bytes) -> httpx.Response:
    """Send in chunks, so that no length says beforehand how much it is."""
    return platform.http.post(path, content=chunks(content))


def send_form(platform: Platform, path: str, field: str, content: bytes) -> httpx.Response:
    parts = [('name="purpose"', b"user_data")] if field == "file" else []
    parts.append((f'name="{field}"; filename="a.txt"', content))
    body = b"".join(
        f"--{BOUNDARY}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + part + b"\r\n"
        for head, part in parts
    )
    return platform.http.post(path, content=chunks(body + f"--{BOUNDARY}--\r\n".encode()), headers=FORM_TYPE)


def chunks(content: bytes) -> Iterator[bytes]:
    for start in range(0, len(content), 65536):
        yield content[start : start + 65536]
