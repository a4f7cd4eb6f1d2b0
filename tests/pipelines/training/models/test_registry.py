"""The model registry, on a real MLflow server."""

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from cluster import mlflow_client
from cluster.db import now
from cluster.mlflow_client import MlflowRestClient, MlflowUnavailable
from cluster.ownership import LOCAL
from cluster.settings import get_settings
from pipelines.training.models import cache as model_cache
from pipelines.training.models import registry
from pipelines.training.models.cache import DamagedModel
from pipelines.training.models.registry import Registry
from pipelines.training.models.versions import (
    ModelDefaults,
    ModelFile,
    ModelNotFound,
    NoEarlierVersion,
    RegistryDisabled,
    Version,
    VersionInUse,
    VersionServed,
)
from tests.support.registry_model import RegistryModel
from tests.support.waiting import TIMEOUT


async def test_a_registered_version_is_read_back_with_its_files(registry_model: RegistryModel) -> None:
    content, adapter = os.urandom(9_000_000), registry_model.file(b"adapter", "f16")
    progress: list[tuple[int, int]] = []

    def on_progress(done: int, total: int) -> None:
        progress.append((done, total))

    version = await registry_model.register(content, b"second", adapter=adapter, on_progress=on_progress)
    total = len(content) + len(b"second") + len(b"adapter")
    assert progress[-1] == (total, total)
    assert len(progress) > 3
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert version.reference == f"{registry_model.name}:v1"
    assert version == await registry_model.registry.find(f"{registry_model.name}:v1")
    assert [file.sha256 for file in version.files] == [
        hashlib.sha256(part).hexdigest() for part in (content, b"second")
    ]
    assert version.adapter == adapter[0]
    assert (version.base_model, version.job_id, version.passed) == ("forgearr/tiny", "job_train", None)
    assert abs((now() - version.created_at).total_seconds()) < 3600
    assert (await registry_model.registry.fetch(version)).read_bytes() == content
    assert (await registry_model.registry.fetch(version, version.files[1])).read_bytes() == b"second"
    assert (await registry_model.registry.fetch(version, adapter[0])).read_bytes() == b"adapter"


async def test_registering_an_export_twice_makes_one_version(registry_model: RegistryModel) -> None:
    first = await registry_model.register(b"a", export="job_once")
    assert await registry_model.register(b"a", export="job_once") == first
    together = await asyncio.gather(*(registry_model.register(b"b", export="job_together") for _ in range(3)))
    model = await registry_model.registry.model(registry_model.name)
    assert {version.reference for version in together} == {model.versions[0].reference}
    assert [version.export_job_id for version in model.versions] == ["job_together", "job_once"]
    assert (await registry_model.registry.fetch(together[0])).read_bytes() == b"b"


async def test_the_served_version_is_set_and_rolled_back(registry_model: RegistryModel) -> None:
    for _ in range(3):
        await registry_model.register()
    for reference in (
        registry_model.name,
        f"{registry_model.name}:latest",
        f"{registry_model.name}:v4",
        "no-such",
        "no-such:v1",
        "No Such",
    ):
        with pytest.raises(ModelNotFound):
            await registry_model.registry.find(reference)
    with pytest.raises(NoEarlierVersion):
        await registry_model.registry.roll_back(registry_model.name)
    assert [await registry_model.registry.set_served(registry_model.name, number) for number in (1, 2, 2, 3)] == [
        None,
        1,
        1,
        2,
    ]
    assert (await registry_model.registry.find(registry_model.name)).number == 3
    assert (await registry_model.registry.find(f"{registry_model.name}:v2")).number == 2
    for target, served in ((2, 3), (1, 2)):
        version, replaced = await registry_model.registry.roll_back(registry_model.name)
        assert (version.number, replaced) == (target, served)
        assert (await registry_model.registry.find(f"{registry_model.name}:latest")).number == target
    with pytest.raises(NoEarlierVersion):
        await registry_model.registry.roll_back(registry_model.name)
    with pytest.raises(ModelNotFound):
        await registry_model.registry.set_served(registry_model.name, 9)
    assert (await registry_model.registry.find(registry_model.name)).number == 1


async def test_a_rollback_skips_deleted_versions(registry_model: RegistryModel) -> None:
    for number in (1, 2, 3):
        await registry_model.register()
        await registry_model.registry.set_served(registry_model.name, number)
    await registry_model.registry.delete_versions(registry_model.name, [2])
    version, _ = await registry_model.registry.roll_back(registry_model.name)
    assert version.number == 1


async def test_an_incomplete_switch_does_not_affect_a_rollback(registry_model: RegistryModel) -> None:
    for number in (1, 2):
        await registry_model.register()
        await registry_model.registry.set_served(registry_model.name, number)
    # A switch writes this before it moves the alias.
    history = {"name": registry_model.name, "key": "forgearr.history", "value": "[1, 2]"}
    await registry_model.mlflow.call("POST", "registered-models/set-tag", json=history)
    assert (await registry_model.registry.roll_back(registry_model.name))[0].number == 1


async def test_a_validation_is_stored_with_its_reasons(registry_model: RegistryModel) -> None:
    await registry_model.register()
    for passed, reasons in ((False, ["perplexity 9 is over 5"]), (True, [])):
        await registry_model.registry.set_validation(registry_model.name, 1, passed, reasons)
        version = await registry_model.registry.find(f"{registry_model.name}:v1")
        assert (version.passed, version.reasons) == (passed, reasons)


async def test_deleting_versions_and_models_deletes_their_files(registry_model: RegistryModel) -> None:
    first, second = await registry_model.register(b"one"), await registry_model.register(b"two")
    await registry_model.registry.set_served(registry_model.name, 2)
    with pytest.raises(VersionServed):
        await registry_model.registry.delete_versions(registry_model.name, [2])
    await registry_model.registry.delete_versions(registry_model.name, [1])
    with pytest.raises(ModelNotFound):
        await registry_model.registry.find(first.reference)
    with pytest.raises(ModelNotFound):
        await registry_model.registry.fetch(first)
    assert await _artifacts(registry_model, first) == []
    assert len(await _artifacts(registry_model, second)) == 1
    assert (await registry_model.register()).number == 3
    with pytest.raises(VersionServed, match=f"{registry_model.name}:v2 is served"):
        await registry_model.registry.delete_model(registry_model.name)
    assert (await registry_model.registry.retire(registry_model.name)).number == 2
    await registry_model.registry.delete_model(registry_model.name)
    assert await _artifacts(registry_model, second) == []
    with pytest.raises(ModelNotFound):
        await registry_model.registry.model(registry_model.name)
    assert registry_model.name not in [model.name for model in await registry_model.registry.models()]
    assert (await registry_model.register()).number == 4


async def test_a_base_version_with_adapters_cannot_be_deleted(registry_model: RegistryModel) -> None:
    base = await registry_model.register()

    async def register(number: int) -> Version:
        export = f"job_{uuid4().hex[:8]}"
        adapter = registry_model.file(f"adapter {number}".encode(), "lora")
        return await registry_model.registry.register(
            f"{registry_model.name}-{number}",
            await registry_model.run(export),
            [],
            adapter,
            base_model=base.reference,
            job_id="job_train",
            export_job_id=export,
            principal=LOCAL,
        )

    first, second = [await register(number) for number in (1, 2)]
    assert (first.is_adapter, base.is_adapter) == (True, False)
    assert await registry_model.registry.adapters_of(base.reference) == [second, first]
    assert await registry_model.registry.adapters_of(first.reference) == []
    assert (await registry_model.registry.fetch(first)).read_bytes() == b"adapter 1"
    for delete in (
        registry_model.registry.delete_versions(base.name, [1]),
        registry_model.registry.delete_model(base.name),
    ):
        with pytest.raises(VersionInUse, match="is an adapter for it"):
            await delete
    for adapter in (first, second):
        await registry_model.registry.delete_model(adapter.name)
    await registry_model.registry.delete_model(base.name)


async def test_copies_share_files_until_the_last_one_is_deleted(registry_model: RegistryModel) -> None:
    version = await registry_model.register(b"shared", adapter=registry_model.file(b"adapter", "f16"))
    copies = [await registry_model.registry.copy(version, f"{registry_model.name}-{number}") for number in (1, 2)]
    for copy in copies:
        assert copy == await registry_model.registry.find(copy.reference)
        assert (copy.files, copy.adapter, copy.job_id) == (version.files, version.adapter, version.job_id)
        assert (copy.number, copy.parent, copy.export_job_id) == (1, version.reference, "")
    await registry_model.registry.delete_model(registry_model.name)
    await registry_model.registry.delete_model(copies[0].name)
    assert (await registry_model.registry.fetch(copies[1])).read_bytes() == b"shared"
    assert len(await _artifacts(registry_model, version)) == 2
    await registry_model.registry.delete_model(copies[1].name)
    assert await _artifacts(registry_model, version) == []


async def test_a_version_with_an_owner_is_private_until_it_is_served(registry_model: RegistryModel) -> None:
    owned = await registry_model.register(owner_id="ada")
    assert (owned.owner_id, owned.visibility) == ("ada", "private")
    ownerless = await registry_model.register()
    assert (ownerless.owner_id, ownerless.visibility) == (None, "shared")
    copy = await registry_model.registry.copy(owned, f"{registry_model.name}-copy")
    assert (copy.owner_id, copy.visibility) == (None, "shared")
    await registry_model.registry.set_served(registry_model.name, 1)
    with pytest.raises(VersionServed):
        await registry_model.registry.set_visibility(registry_model.name, 1, "private")
    served = await registry_model.registry.find(registry_model.name)
    assert (served.owner_id, served.visibility) == ("ada", "served")


async def test_a_retired_model_can_be_served_again(registry_model: RegistryModel) -> None:
    for number in (1, 2):
        await registry_model.register()
        await registry_model.registry.set_served(registry_model.name, number)
    assert (await registry_model.registry.retire(registry_model.name)).number == 2
    for attempt in (registry_model.registry.find, registry_model.registry.retire):
        with pytest.raises(ModelNotFound, match="No version of a model"):
            await attempt(registry_model.name)
    assert (await registry_model.registry.model(registry_model.name)).served is None
    await registry_model.registry.set_served(registry_model.name, 1)
    version, replaced = await registry_model.registry.roll_back(registry_model.name)
    assert (version.number, replaced) == (2, 1)


async def test_no_copy_remains_of_a_version_deleted_meanwhile(
    registry_model: RegistryModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = await registry_model.register(b"gone")
    call = registry_model.mlflow.call

    async def delete_before(method: str, path: str, **options: Any) -> dict[str, Any]:
        if path == "model-versions/create":
            monkeypatch.setattr(registry_model.mlflow, "call", call)
            await registry_model.registry.delete_model(registry_model.name)
        return await call(method, path, **options)

    monkeypatch.setattr(registry_model.mlflow, "call", delete_before)
    with pytest.raises(ModelNotFound):
        await registry_model.registry.copy(version, f"{registry_model.name}-copy")
    with pytest.raises(ModelNotFound):
        await registry_model.registry.model(f"{registry_model.name}-copy")


async def test_a_copy_with_other_defaults_must_be_validated_again(registry_model: RegistryModel) -> None:
    version = await registry_model.register(b"one")
    await registry_model.registry.set_validation(registry_model.name, 1, True)
    defaults = ModelDefaults(system="Be brief.", parameters={"temperature": 0, "stop": ["x"]}, license=["MIT"])
    copy = await registry_model.registry.copy(
        await registry_model.registry.find(version.reference), f"{registry_model.name}-brief", defaults
    )
    assert (copy.defaults, copy.passed) == (defaults, None)
    second = await registry_model.registry.copy(copy, f"{registry_model.name}-again")
    assert (second.defaults, second.parent) == (defaults, copy.reference)


async def test_an_adapter_can_be_registered_from_blobs(registry_model: RegistryModel) -> None:
    base = await registry_model.register(b"base")
    adapter = ModelFile("a.gguf", "f16", "a" * 64, 7)
    name = f"{registry_model.name}-adapted"
    version = await registry_model.registry.register_blobs(
        name, [], adapter, base_model=base.reference, defaults=ModelDefaults()
    )
    assert (version.files, version.adapter, version.file, version.run_id) == ([], adapter, adapter, "")
    assert "a" * 64 in await registry_model.registry.blobs()
    with pytest.raises(VersionInUse, match=f"{name}:v1 is an adapter for it"):
        await registry_model.registry.delete_model(registry_model.name)
    await registry_model.registry.delete_model(name)
    await registry_model.registry.delete_model(registry_model.name)
    with pytest.raises(ModelNotFound):
        await registry_model.registry.register_blobs(
            name, [], adapter, base_model=base.reference, defaults=ModelDefaults()
        )
    with pytest.raises(ModelNotFound):
        await registry_model.registry.model(name)


async def test_a_list_takes_two_requests_whatever_its_length(registry_model: RegistryModel, mlflow_server: str) -> None:
    for _ in range(12):
        await registry_model.register(export=f"job_{uuid4().hex[:8]}")
    await registry_model.mlflow.call("POST", "registered-models/create", json={"name": f"foreign-{uuid4().hex}"})
    requests: list[str] = []

    async def count(request: httpx.Request) -> None:
        requests.append(request.url.path)

    async with httpx.AsyncClient(base_url=mlflow_server, event_hooks={"request": [count]}, timeout=TIMEOUT) as client:
        models = await Registry(MlflowRestClient(client)).models()
    assert len(requests) == 2
    (ours,) = (model for model in models if model.name == registry_model.name)
    assert [version.number for version in ours.versions] == list(range(12, 0, -1))
    assert ours.served is None
    assert not [model.name for model in models if model.name.startswith("foreign")]


async def test_a_list_longer_than_a_page_is_complete(
    registry_model: RegistryModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_client, "PAGE_SIZE", 2)
    for _ in range(5):
        await registry_model.register()
    assert [version.number for version in (await registry_model.registry.model(registry_model.name)).versions] == [
        5,
        4,
        3,
        2,
        1,
    ]


# Files


async def test_a_file_is_fetched_once_and_again_if_it_is_incomplete(registry_model: RegistryModel) -> None:
    version = await registry_model.register(b"content")
    copy = await registry_model.registry.fetch(version)
    assert copy == get_copy(version)
    written = copy.stat().st_ino
    assert (await registry_model.registry.fetch(version)).stat().st_ino == written
    copy.write_bytes(b"conte")
    assert (await registry_model.registry.fetch(version)).read_bytes() == b"content"
    assert [file.suffix for file in copy.parent.iterdir() if file.suffix != ".lock"] == [".gguf"]


async def test_concurrent_fetches_download_once(registry_model: RegistryModel, mlflow_server: str) -> None:
    version = await registry_model.register(os.urandom(5_000_000))
    downloads: list[str] = []

    async def count(request: httpx.Request) -> None:
        if "mlflow-artifacts" in request.url.path:
            downloads.append(request.url.path)

    async with httpx.AsyncClient(base_url=mlflow_server, event_hooks={"request": [count]}, timeout=TIMEOUT) as client:
        other = Registry(MlflowRestClient(client))
        copies = await asyncio.gather(*(other.fetch(version) for _ in range(4)))
    assert set(copies) == {get_copy(version)}
    assert len(downloads) == 1


async def test_a_file_that_changed_in_storage_is_refused(registry_model: RegistryModel) -> None:
    version = await registry_model.register(b"content")
    await registry_model.mlflow.upload(
        version.run_id, f"gguf/{version.export_job_id}/{version.files[0].name}", b"c0ntent"
    )
    with pytest.raises(DamagedModel):
        await registry_model.registry.fetch(version)
    assert not get_copy(version).exists()


async def test_a_transfer_resumes_after_a_dropped_connection(registry_model: RegistryModel, mlflow_server: str) -> None:
    content = os.urandom(6_000_000)
    async with _unreliable_proxy(mlflow_server, 2_000_000, times=2) as (url, broken):
        async with _client_through(url, mlflow_server) as client:
            version = await RegistryModel(MlflowRestClient(client), registry_model.folder).register(content)
        assert len(broken) == 2
        broken.clear()
        async with _client_through(url, mlflow_server) as client:
            assert (await Registry(MlflowRestClient(client)).fetch(version)).read_bytes() == content
        assert len(broken) == 2


async def test_an_unavailable_mlflow_is_a_retryable_error(home: Path) -> None:
    async with mlflow_client.connect("http://127.0.0.1:9") as mlflow:
        with pytest.raises(MlflowUnavailable) as caught:
            await Registry(mlflow).models()
    assert caught.value.retryable


async def test_without_mlflow_there_is_no_registry(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_MLFLOW__ENABLED", "false")
    get_settings.cache_clear()
    with pytest.raises(RegistryDisabled, match=r"mlflow\.enabled"):
        async with registry.connect():
            pass


def test_the_least_recently_used_files_are_evicted(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_ENGINES__CACHE_GB", "0.000003")
    get_settings.cache_clear()
    copies: list[Path] = []
    for number in range(5):
        source = tmp_path / f"{number}.gguf"
        source.write_bytes(bytes([number]) * 1000)
        copies.append(model_cache.cache_file(source, f"{number}" * 64))
        assert source.exists()
    assert all(copy.exists() for copy in copies)  # used a moment ago
    unfinished = copies[0].parent / "x.part"
    unfinished.write_bytes(b"")
    for age, file in enumerate([unfinished, *reversed(copies)]):
        used_at = time.time() - 100_000 + age
        os.utime(file, (used_at, used_at))
    assert model_cache.find("4" * 64, 1000) == copies[4]  # used again
    model_cache.evict(copies[0])
    assert [copy.exists() for copy in copies] == [True, True, False, False, True]
    assert not unfinished.exists()


def get_copy(version: Version) -> Path:
    return Path(os.environ["FORGEARR_HOME"]) / "cache" / "models" / f"{version.files[0].sha256}.gguf"


async def _artifacts(registry_model: RegistryModel, version: Version) -> list[dict[str, Any]]:
    params = {"run_id": version.run_id, "path": f"gguf/{version.export_job_id}"}
    return (await registry_model.mlflow.call("GET", "artifacts/list", params=params)).get("files", [])


def _client_through(proxy: str, server: str) -> httpx.AsyncClient:
    """A client of the MLflow server that connects to a proxy. The server accepts its own name only."""
    url = httpx.URL(server)
    headers = {"Host": url.netloc.decode()}
    return httpx.AsyncClient(base_url=proxy, headers=headers, auth=(url.username, url.password), timeout=TIMEOUT)


@asynccontextmanager
async def _unreliable_proxy(target: str, after: int, times: int) -> AsyncGenerator[tuple[str, list[int]]]:
    """Run a proxy that drops a connection once `after` bytes have passed in one direction.

    Yields its URL and the number of bytes that each dropped connection carried. It drops `times` connections at most.
    """
    address = httpx.URL(target)
    broken: list[int] = []

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passed = 0
        while chunk := await reader.read(65536):
            passed += len(chunk)
            if passed > after and len(broken) < times:
                broken.append(passed)
                return
            writer.write(chunk)
            await writer.drain()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward_reader, onward_writer = await asyncio.open_connection(address.host, address.port)
        directions = [
            asyncio.create_task(copy(reader, onward_writer)),
            asyncio.create_task(copy(onward_reader, writer)),
        ]
        await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        for direction in directions:
            direction.cancel()
        await asyncio.gather(*directions, return_exceptions=True)
        for end in (writer, onward_writer):
            end.transport.abort()

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", broken
    finally:
        server.close()
