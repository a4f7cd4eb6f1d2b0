"""API4, unrestricted resource consumption: what one account wants to store, and to compute, beyond its share."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from io import BytesIO
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select, update

from cluster import identity, storage
from cluster.db import now
from cluster.files import store as file_store
from cluster.files.tables import File
from cluster.identity.account_limits import MB, AccountLimitReached
from cluster.settings import get_settings
from jobs import leases
from jobs.dispatch.capacity import ClusterCapacity
from jobs.leases import LeaseWatch
from jobs.states import State
from jobs.tables import Job, JobEvent
from pipelines.training.data.datasets import Dataset
from pipelines.training.models import storage_limit
from serve.openai.responses import store as response_store
from tests.support.api_client import ApiClient
from tests.support.registry_model import RegistryModel

USAGE = "/api/v1/usage"
HALF = b"x" * (MB // 2 + 1000)
SAMPLE = b'{"messages":[{"role":"user","content":"%b"},{"role":"assistant","content":"No."}]}\n'


@pytest.fixture(autouse=True)
def limits(home: object, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FILES_MB", "DATASETS_MB", "RESPONSES_MB", "MODELS_MB", "GPU_HOURS"):
        monkeypatch.setenv(f"FORGEARR_LIMITS__ACCOUNT_{name}", "1")
    get_settings.cache_clear()


class Uploads:
    """What a user sends to store something of half the size that an account may have."""

    def __init__(self, api: ApiClient) -> None:
        self.api = api
        self.count = 0

    async def send_file(self, username: str) -> httpx.Response:
        options: dict[str, Any] = {"data": {"purpose": "user_data"}, "files": {"file": ("a.bin", HALF)}}
        return await self._send(username, "/v1/files", **options)

    async def send_dataset(self, username: str) -> httpx.Response:
        self.count += 1
        content = SAMPLE % (b"Is it on? " * (MB // 20 + self.count))
        return await self._send(username, "/api/v1/datasets", params={"name": "house"}, content=content)

    async def begin_upload(self, username: str) -> httpx.Response:
        body = {"purpose": "user_data", "filename": "a.bin", "bytes": len(HALF), "mime_type": "text/plain"}
        return await self.api.request(username, "POST", "/v1/uploads", json=body)

    async def _send(self, username: str, path: str, **options: Any) -> httpx.Response:
        headers = {"Authorization": self.api.authorization(username)}
        return await self.api.http.post(path, headers=headers, **options)


SEND: dict[str, Callable[[Uploads, str], Awaitable[httpx.Response]]] = {
    "files_mb": Uploads.send_file,
    "datasets_mb": Uploads.send_dataset,
}


async def used(api: ApiClient, username: str, resource: str) -> Any:
    (account,) = (await api.request(username, "GET", USAGE)).json()["data"]
    return account["usage"][resource]["used"]


@pytest.mark.parametrize("resource", SEND)
async def test_fill_the_storage(api: ApiClient, resource: str) -> None:
    send, uploads = SEND[resource], Uploads(api)
    first, second = await send(uploads, "ada"), await send(uploads, "ada")
    assert first.is_success, first.text
    assert second.status_code == 403
    error = second.json()
    message = error["error"]["message"] if resource == "files_mb" else error["message"]
    assert message.startswith("Your account has 1 MB of ")
    assert "and may have 1. Delete some" in message
    assert await used(api, "ada", resource) == 1
    # The refused bytes are gone. Neither other users nor administrators are affected.
    assert len(await asyncio.to_thread(_stored, resource.removesuffix("_mb"))) == 1
    assert (await send(uploads, "bob")).is_success
    assert all([(await send(uploads, "admin")).is_success for _ in range(3)])
    identifier = first.json()["id"]
    path = f"/v1/files/{identifier}" if resource == "files_mb" else f"/api/v1/datasets/{identifier}"
    assert (await api.request("ada", "DELETE", path)).is_success
    assert await used(api, "ada", resource) == 0
    assert (await send(uploads, "ada")).is_success


def _stored(folder: str) -> list[str]:
    disk, root = storage._filesystem_and_root()  # pyright: ignore[reportPrivateUsage]
    return list(disk.find(f"{root}/{folder}"))


async def test_send_everything_at_the_same_moment(api: ApiClient) -> None:
    uploads = Uploads(api)
    responses = await asyncio.gather(*(uploads.send_file("ada") for _ in range(6)))
    assert sorted(response.status_code for response in responses) == [200, *[403] * 5]
    async with api.database.read_transaction() as session:
        assert await session.scalar(select(func.count()).select_from(File)) == 1


async def test_announce_uploads_instead(api: ApiClient) -> None:
    uploads = Uploads(api)
    first, second = await uploads.begin_upload("ada"), await uploads.begin_upload("ada")
    assert (first.status_code, second.status_code) == (200, 403)
    assert (await uploads.send_file("ada")).status_code == 403
    assert (await api.request("ada", "POST", f"/v1/uploads/{first.json()['id']}/cancel")).is_success
    assert (await uploads.send_file("ada")).status_code == 200


async def test_what_a_job_has_made_is_stored_in_any_case(api: ApiClient) -> None:
    ada = identity.principal(api.users["ada"])
    await Uploads(api).send_file("ada")
    file = await file_store.create_file(
        api.database, BytesIO(HALF), filename="o", purpose="batch_output", principal=ada, file_id="file-output"
    )
    assert await asyncio.to_thread(lambda: file_store.open_file(file).read()) == HALF
    assert await used(api, "ada", "files_mb") == 2
    assert (await Uploads(api).begin_upload("ada")).status_code == 403


async def test_fill_the_database_with_responses(api: ApiClient) -> None:
    """The account is full before the model is asked, so no answer is lost."""
    ada = identity.principal(api.users["ada"])
    body = {"id": "resp_1", "previous_response_id": None, "output": [{"text": "x" * MB}]}
    await response_store.store(api.database, body, [], ada)
    request = {"model": "forgearr/tiny", "input": "Hello"}
    refused = await api.request("ada", "POST", "/v1/responses", json=request)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "account_limit_reached")
    assert '"store": false' in refused.json()["error"]["message"]
    # No engine runs here: who is not refused gets that far.
    for username, fields in {"ada": {"store": False}, "bob": {}, "admin": {}}.items():
        answered = await api.request(username, "POST", "/v1/responses", json=request | fields)
        assert answered.json()["error"]["code"] == "engine_unavailable"
    assert (await api.request("ada", "DELETE", "/v1/responses/resp_1")).is_success
    assert await used(api, "ada", "responses_mb") == 0


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_fill_the_registry(api: ApiClient, registry_model: RegistryModel) -> None:
    ada, bob, admin = (identity.principal(api.users[name]) for name in ("ada", "bob", "admin"))
    models = registry_model.registry
    await storage_limit.require_room(models, ada)
    await registry_model.register(HALF, owner_id=ada.id)
    await api.queue_training(result={"model_bytes": MB // 4})
    await storage_limit.require_room(models, ada)
    await registry_model.register(HALF, owner_id=ada.id)
    with pytest.raises(AccountLimitReached, match=r"has 2 MB of models, and may have 1\. Delete versions"):
        await storage_limit.require_room(models, ada)
    await api.queue_training(result={"model_bytes": MB})
    with pytest.raises(AccountLimitReached):
        await storage_limit.require_room(None, ada)
    for principal in (bob, admin):
        await storage_limit.require_room(models, principal)
    assert await used(api, "ada", "models_mb") == 3
    everybody = (await api.request("admin", "GET", USAGE)).json()["data"]
    assert [account["usage"]["models_mb"]["used"] for account in everybody] == [3, 0, 0]
    assert await storage_limit.read_usage(api.database, models, []) == {}


async def test_use_the_gpus_all_day(api: ApiClient) -> None:
    """What waits for GPU time says so. Light jobs, and those of others, go on."""
    database = api.database
    gpu: dict[str, Any] = {
        "resources": {"gpus": 1, "cpus": 1, "memory_mb": 0, "labels": {}, "workers": 1},
        "demand": "1 CPU, 1 GPU",
    }
    running = await api.queue_job("probe", {}, **gpu)
    capacity = ClusterCapacity(slots=8)
    async with database.transaction() as session:
        token = await leases.take_leadership(session, "here", LeaseWatch(), None)
    assert token

    async def claim() -> set[str]:
        nodes = [{"NodeID": "node", "Resources": {"CPU": 64, "GPU": 64}, "Labels": {}}]
        capacity.update_cluster({"CPU": 64, "GPU": 64}, nodes)
        if not capacity.pool_size():
            capacity.add("worker-1")
        async with database.transaction() as session:
            return {claim.job_id for claim in await leases.claim_jobs(session, token, capacity)}

    assert await claim() == {running}
    async with database.transaction() as session:
        began = update(JobEvent).where(JobEvent.job_id == running, JobEvent.type == State.RUNNING)
        await session.execute(began.values(created_at=now() - timedelta(minutes=61)))
    assert await used(api, "ada", "gpu_hours") == 2  # 61 minutes, rounded up
    more = await api.queue_job("probe", {}, **gpu)
    light, others, theirs = [
        await api.queue_job("probe", {}),
        await api.queue_job("probe", {}, "bob", **gpu),
        await api.queue_job("probe", {}, "admin", **gpu),
    ]
    assert await claim() == {light, others, theirs}
    waiting_for = (await api.get_job(more))["waiting_for"]
    assert waiting_for.startswith("GPU time: its account has reached the limit of 1 GPU hours")
    async with database.transaction() as session:
        await session.execute(update(JobEvent).values(created_at=now() - timedelta(days=2)))
        ended = update(Job).where(Job.id == running).values(state=State.SUCCEEDED, updated_at=now() - timedelta(days=2))
        await session.execute(ended)
    assert await claim() == {more}


async def test_a_dataset_counts_for_each_of_its_owners(api: ApiClient) -> None:
    uploads = Uploads(api)
    for username in ("ada", "bob"):
        uploads.count = 0  # the same content
        assert (await uploads.send_dataset(username)).is_success
    assert await used(api, "bob", "datasets_mb") == 1
    async with api.database.read_transaction() as session:
        addresses = await session.scalars(select(Dataset.address))
        assert len(set(addresses)) == 1
