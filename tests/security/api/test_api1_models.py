"""API1, broken object level authorization: what a user wants of a model that somebody else has trained."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from cluster import identity
from cluster.settings import get_settings
from pipelines.training.export.job import owner_of_version
from pipelines.training.models import base_models
from pipelines.training.models.versions import ModelNotFound, Version
from serve.engines.gguf.replica import GgufEngine
from serve.openai.batches.line import LineRunner
from serve.openai.files.validation import BatchLine
from tests.support.api_client import ApiClient
from tests.support.app_server import unload_models
from tests.support.registry_model import RegistryModel
from tests.support.small_models import write_constant_model

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)

HELLO = [{"role": "user", "content": "Hello"}]
SECRET = "The key of the cellar lies under the third stone."
MODEL = "MODEL"
"""Stands for the name of the model, in the requests below."""

USES: dict[str, dict[str, Any]] = {
    "POST /v1/chat/completions": {"model": MODEL, "messages": HELLO, "max_tokens": 1},
    "POST /v1/completions": {"model": MODEL, "prompt": "Hello", "max_tokens": 1},
    "POST /v1/embeddings": {"model": MODEL, "input": "Hello"},
    "POST /v1/rerank": {"model": MODEL, "query": "Hello", "documents": ["Hello"]},
    "POST /v1/query": {"model": MODEL, "prompt": "Hello"},
    "POST /v1/responses": {"model": MODEL, "input": "Hello", "max_output_tokens": 1},
    "POST /api/chat": {"model": MODEL, "messages": HELLO, "options": {"num_predict": 1}},
    "POST /api/generate": {"model": MODEL, "prompt": "Hello", "options": {"num_predict": 1}},
    "POST /api/embed": {"model": MODEL, "input": "Hello"},
    "POST /api/embeddings": {"model": MODEL, "prompt": "Hello"},
    "POST /api/show": {"model": MODEL},
}
CHANGES: dict[str, dict[str, Any] | None] = {
    "PATCH /api/v1/models/NAME/versions/1": {"visibility": "shared"},
    "DELETE /v1/models/MODEL": None,
    "DELETE /api/delete": {"model": MODEL},
}
LOOKS: dict[str, None] = {"GET /v1/models/MODEL": None, "GET /api/v1/models/NAME": None}
LISTS = ("/v1/models", "/api/v1/models", "/api/tags", "/api/ps", "/api/v1/engines")


class House:
    """The server, a model, and who asks for it."""

    def __init__(self, api: ApiClient, registry_model: RegistryModel, engine: GgufEngine) -> None:
        self.api = api
        self.registry_model = registry_model
        self.registry = registry_model.registry
        self.engine = engine
        self.name = registry_model.name

    async def register(self, username: str | None = "ada") -> Version:
        """A version that this account has trained."""
        file = write_constant_model(self.registry_model.folder / "constant.gguf", SECRET)
        owner_id = self.api.users[username].id if username else None
        return await self.registry_model.register(file.read_bytes(), owner_id=owner_id)

    async def send(self, username: str, operation: str, body: Any, name: str | None = None) -> httpx.Response:
        """Send a request that names the model, or another one of this name."""
        name = name or self.name
        method, path = operation.replace("MODEL", f"{name}:v1").replace("NAME", name).split(" ")
        if body is not None:
            body = {**body, "model": f"{name}:v1"} if "model" in body else body
        return await self.api.request(username, method, path, **({} if body is None else {"json": body}))

    async def share(self, username: str, visibility: str) -> httpx.Response:
        return await self.send(username, "PATCH /api/v1/models/NAME/versions/1", {"visibility": visibility})

    async def can_ask(self, username: str, model: str | None = None) -> bool:
        body = {"model": model or f"{self.name}:v1", "messages": HELLO}
        response = await self.api.request(username, "POST", "/v1/chat/completions", json=body)
        assert response.status_code in {200, 404}, response.text
        return response.status_code == 200 and SECRET in response.text

    async def delete(self, username: str) -> set[tuple[int, str]]:
        """Try each way to delete the model or its version; returns the statuses and codes."""
        bodies = {"DELETE /v1/models/NAME": None, **CHANGES}
        operations = {operation: body for operation, body in bodies.items() if operation.startswith("DELETE")}
        if username == "admin":
            operations |= {"DELETE /api/v1/models/NAME": None, "DELETE /api/v1/models/NAME/versions/1": None}
        answers = {operation: await self.send(username, operation, body) for operation, body in operations.items()}
        return {(answer.status_code, code_of(answer)) for answer in answers.values()}


@pytest.fixture
async def house(api: ApiClient, registry_model: RegistryModel, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    monkeypatch.setenv("FORGEARR_ENGINES__SLOTS", "1")
    get_settings.cache_clear()
    engine = api.app.state.engine = GgufEngine(get_settings().engines)
    yield House(api, registry_model, engine)
    await unload_models(engine)


async def test_a_user_cannot_name_anothers_model(house: House) -> None:
    await house.register()
    # First those who may: what they ask for is in the cache then.
    for operation, body in {**USES, **LOOKS}.items():
        for username in ("ada", "admin"):
            assert (await house.send(username, operation, body)).status_code != 404, operation
    for operation, body in {**USES, **LOOKS, **CHANGES}.items():
        refused = await house.send("bob", operation, body)
        unknown = await house.send("bob", operation, body, name="m-unknown")
        assert refused.status_code == unknown.status_code == 404, operation
        # Nothing tells it from a name that does not exist.
        assert comparable(refused).replace(house.name, "m-unknown") == comparable(unknown)


async def test_a_user_sees_anothers_model_in_no_list(house: House) -> None:
    await house.register()
    assert await house.can_ask("ada")  # it is in memory now
    for path in LISTS:
        params = {"limit": 100} if path == "/api/v1/models" else {}
        for username, sees in (("ada", True), ("admin", True), ("bob", False)):
            listed = await house.api.request(username, "GET", path, params=params)
            assert listed.status_code == 200
            assert (house.name in listed.text) == sees, (path, username)
    assert house.name not in (await house.api.request("ada", "GET", "/models")).text


async def test_a_user_cannot_ask_anothers_model_in_a_batch(house: House) -> None:
    await house.register()
    body = {"model": f"{house.name}:v1", "messages": HELLO}
    line = BatchLine(custom_id="1", method="POST", url="/v1/chat/completions", body=body)
    succeeded: dict[str, bool] = {}
    for username in ("ada", "bob"):
        principal = identity.principal(house.api.users[username])
        result = await LineRunner(house.api.database, house.engine, principal).run(1, line)
        succeeded[username] = result.succeeded and SECRET.encode() in result.line
    assert succeeded == {"ada": True, "bob": False}


async def test_a_user_cannot_train_anothers_model_further(house: House) -> None:
    reference = (await house.register()).reference
    for username in ("ada", "admin"):
        assert await asyncio.to_thread(base_models.pin_reference, reference, house.api.users[username].id) == reference
    with pytest.raises(ModelNotFound, match=f"There is no model version {reference}"):
        await asyncio.to_thread(base_models.pin_reference, reference, house.api.users["bob"].id)
    body = {"model": reference, "training_file": "file-unknown"}
    for username, missing in (("ada", "file_not_found"), ("bob", "model_not_found")):
        refused = await house.api.request(username, "POST", "/v1/fine_tuning/jobs", json=body)
        assert (refused.status_code, code_of(refused)) == (404, missing)


async def test_what_a_user_trains_is_theirs_whoever_exports_it(api: ApiClient) -> None:
    ada, admin = api.users["ada"].id, api.users["admin"].id
    owners = [await owner_of_version(api.database, trainer) for trainer in (ada, admin, None, "nobody any more")]
    assert owners == [ada, None, None, "nobody any more"]


async def test_a_shared_model_is_everybodys_until_its_owner_takes_it_back(house: House) -> None:
    await house.register()
    assert not await house.can_ask("bob")
    shared = await house.share("ada", "shared")
    assert (shared.status_code, shared.json()["visibility"]) == (200, "shared")
    assert await house.can_ask("bob")
    # To use it is no right to change it.
    refused = await house.share("bob", "private")
    assert (refused.status_code, code_of(refused)) == (403, "NOT_YOUR_MODEL")
    assert await house.delete("bob") == {(403, "NOT_YOUR_MODEL"), (403, "not_your_model")}
    assert (await house.share("ada", "private")).status_code == 200
    assert not await house.can_ask("bob")
    assert (await house.share("ada", "served")).status_code == 422


async def test_a_deployed_model_is_everybodys(house: House) -> None:
    await house.register()
    await house.registry.set_served(house.name, 1)
    assert await house.can_ask("bob", house.name)
    # It stays so when another version is served, because others rely on it.
    await house.register(None)
    await house.registry.set_served(house.name, 2)
    assert await house.can_ask("bob")
    refused = await house.share("ada", "private")
    assert (refused.status_code, code_of(refused)) == (403, "NOT_YOUR_MODEL")


async def test_what_is_served_is_deleted_by_nobody(house: House) -> None:
    await house.register()
    await house.registry.set_served(house.name, 1)
    assert await house.delete("ada") == {(403, "NOT_YOUR_MODEL"), (403, "not_your_model")}
    assert await house.delete("admin") == {(409, "VERSION_SERVED"), (409, "version_served")}
    assert (await house.share("admin", "private")).status_code == 409
    assert await house.can_ask("bob", house.name)

    path = f"/api/v1/models/{house.name}/retire"
    assert (await house.api.request("ada", "POST", path)).status_code == 403
    retired = await house.api.request("admin", "POST", path)
    assert (retired.status_code, retired.json()) == (200, {"name": house.name, "version": 1, "warning": None})
    assert (await house.api.request("admin", "POST", path)).status_code == 404
    assert not await house.can_ask("bob", house.name)
    # Its owner does not delete what others relied on, even now.
    assert await house.delete("ada") == {(403, "NOT_YOUR_MODEL"), (403, "not_your_model")}
    assert await house.can_ask("bob")
    assert (await house.send("admin", "DELETE /v1/models/NAME", None)).status_code == 200
    assert not await house.can_ask("admin")


async def test_an_owner_deletes_what_was_never_served(house: House) -> None:
    await house.register()
    assert (await house.send("ada", "DELETE /v1/models/NAME", None)).status_code == 200
    assert not await house.can_ask("admin")


async def test_an_owner_deletes_no_version_of_others_with_their_own(house: House) -> None:
    await house.register()
    await house.register("bob")
    assert (await house.send("ada", "DELETE /v1/models/NAME", None)).status_code == 200
    assert await house.can_ask("bob", f"{house.name}:v2")
    await house.register(None)
    refused = await house.send("bob", "DELETE /v1/models/NAME", None)
    assert (refused.status_code, code_of(refused)) == (403, "not_your_model")
    assert await house.can_ask("bob", f"{house.name}:v2")


async def test_a_copy_does_not_belong_to_the_owner_of_its_original(house: House) -> None:
    version = await house.register()
    copy = f"{house.name}-copy"
    body = {"source": version.reference, "destination": copy}
    assert (await house.api.request("admin", "POST", "/api/copy", json=body)).status_code == 200
    assert (await house.api.request("admin", "POST", f"/api/v1/models/{copy}/retire")).status_code == 200
    refused = await house.api.request("ada", "DELETE", f"/v1/models/{copy}:v1")
    assert (refused.status_code, code_of(refused)) == (403, "not_your_model")
    assert await house.can_ask("bob", f"{copy}:v1")
    # The original is as private as before.
    assert not await house.can_ask("bob")


def comparable(response: httpx.Response) -> str:
    """The answer without the time."""
    content = response.json()
    content.pop("timestamp", None)
    return str(content)


def code_of(response: httpx.Response) -> str:
    content = response.json()
    return content["error_code"] if "error_code" in content else content["error"]["code"]
