"""/api/v1/models over HTTP, on a real MLflow server."""

from collections.abc import AsyncIterator

import httpx
import pytest

from cluster.db import Database
from serve.app import create_app
from tests.support.registry_model import RegistryModel

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


@pytest.fixture
async def client(database: Database, registry_model: RegistryModel) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app())
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        yield client


async def test_models_are_listed_and_shown(client: httpx.AsyncClient, registry_model: RegistryModel) -> None:
    version = await registry_model.register(b"one", b"two", adapter=registry_model.file(b"adapter", "f16"))
    await registry_model.register()
    await registry_model.registry.set_validation(registry_model.name, 1, False, ["too dull"])
    await registry_model.registry.set_served(registry_model.name, 2)
    body = (await client.get(f"/api/v1/models/{registry_model.name}")).json()
    assert (body["name"], body["served_version"]) == (registry_model.name, 2)
    newest, oldest = body["versions"]
    assert (newest["model_name"], newest["served"], newest["passed"]) == (f"{registry_model.name}:v2", True, None)
    assert (oldest["served"], oldest["passed"], oldest["reasons"]) == (False, False, ["too dull"])
    assert [file["sha256"] for file in oldest["files"]] == [file.sha256 for file in version.files]
    assert oldest["adapter"]["quantization"] == "f16"
    assert oldest["mlflow_run_id"] == version.run_id
    page = (await client.get("/api/v1/models")).json()
    assert body in page["items"]
    assert page["total"] == len(page["items"])
    last = (await client.get("/api/v1/models", params={"skip": page["total"] - 1, "limit": 1})).json()
    assert last["items"] == page["items"][-1:]
    for unknown in ("no-such", "No%20Such"):
        response = await client.get(f"/api/v1/models/{unknown}")
        assert response.status_code in {404, 422}


async def test_an_impossible_deployment_is_refused_and_queues_no_job(
    client: httpx.AsyncClient, registry_model: RegistryModel
) -> None:
    await registry_model.register()
    path = f"/api/v1/models/{registry_model.name}/deploy"
    unknown = await client.post(path, json={"version": 2})
    assert (unknown.status_code, unknown.json()["error_code"]) == (404, "MODEL_NOT_FOUND")
    refused = await client.post(path, json={"version": 1})
    assert (refused.status_code, refused.json()["error_code"]) == (409, "VERSION_NOT_PASSED")
    assert (await client.get("/api/v1/jobs")).json()["total"] == 0
    jobs = [
        (await client.post(path, json={"version": 1, "force": True}, headers={"Idempotency-Key": "once"})).json()
        for _ in range(2)
    ]
    assert jobs[0]["id"] == jobs[1]["id"]
    assert jobs[0]["kind"] == "deploy"
    assert jobs[0]["spec"].items() >= {"name": registry_model.name, "version": 1, "force": True}.items()


async def test_rollback_and_deletion(client: httpx.AsyncClient, registry_model: RegistryModel) -> None:
    path = f"/api/v1/models/{registry_model.name}"
    for number in (1, 2):
        await registry_model.register()
        await registry_model.registry.set_served(registry_model.name, number)
    rolled_back = await client.post(f"{path}/rollback")
    warning = f"{registry_model.name}:v1 is served, but it was never validated."
    assert rolled_back.json() == {"name": registry_model.name, "version": 1, "previous": 2, "warning": warning}
    refused = await client.post(f"{path}/rollback")
    assert (refused.status_code, refused.json()["error_code"]) == (409, "NO_EARLIER_VERSION")
    served = await client.delete(f"{path}/versions/1")
    assert (served.status_code, served.json()["error_code"]) == (409, "VERSION_SERVED")
    assert (await client.delete(f"{path}/versions/2")).status_code == 204
    assert (await client.delete(f"{path}/versions/2")).status_code == 404
    served = await client.delete(path)
    assert (served.status_code, served.json()["error_code"]) == (409, "VERSION_SERVED")
    assert "forgearr retire" in served.json()["message"]
    assert (await client.post(f"{path}/retire")).json()["version"] == 1
    assert (await client.delete(path)).status_code == 204
    assert (await client.get(path)).status_code == 404
