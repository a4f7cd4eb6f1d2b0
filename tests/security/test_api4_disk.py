"""API4, resource consumption: what somebody wants who fills the disk, which the database shares."""

import hashlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from cluster.settings import get_settings
from tests.support.api_client import ApiClient

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)

MORE_THAN_ANY_DISK_MB = 10**12
LARGE = b'{"text": "' + b"x" * 100_000 + b'"}\n'
DIGEST = hashlib.sha256(LARGE).hexdigest()


@pytest.fixture
def full_disk(api: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_STORAGE__MIN_FREE_MB", str(MORE_THAN_ANY_DISK_MB))
    get_settings.cache_clear()


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


async def test_send_without_a_length_what_fills_the_disk(api: ApiClient, full_disk: None) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield LARGE

    headers = {"Authorization": api.authorization("ada")}
    response = await api.http.post("/api/v1/datasets", headers=headers, content=chunks())
    assert response.status_code == 507


async def test_a_full_disk_does_not_keep_people_from_clearing_it(api: ApiClient, full_disk: None) -> None:
    job = await api.queue_job("probe", {})
    assert (await api.request("ada", "POST", f"/api/v1/jobs/{job}/cancel")).status_code == 200
    assert (await api.request("ada", "GET", "/api/v1/jobs")).status_code == 200
