"""Deployment and rollback: refusals, the order of the steps, and what is sent to Ollama."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
from gguf import GGUFWriter
from sqlalchemy import select

from cluster.audit_log import AuditLogEntry
from cluster.db import get_database
from cluster.ownership import LOCAL
from cluster.settings import get_settings
from jobs import queue
from jobs.context import Context
from jobs.leases import Claim
from jobs.queue import JobRequest
from pipelines.training.deploy import job as deploy_job
from pipelines.training.deploy.job import VersionNotPassed
from pipelines.training.deploy.ollama_push import OllamaRefused, OllamaUnavailable
from pipelines.training.models import cache as model_cache
from pipelines.training.models.versions import ModelNotFound, NoEarlierVersion
from pipelines.training.spec import DeploySpec
from tests.support.recording_link import RecordingLink
from tests.support.registry_model import RegistryModel
from tests.support.services.fake_ollama import FakeOllama, running_fake_ollama
from tests.support.waiting import TIMEOUT

CHAT_TEMPLATE = files("configs").joinpath("tiny/chat_template.jinja").read_text()


@pytest.fixture(autouse=True)
async def no_engine(migrated: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """An installation with a database and without an engine."""
    monkeypatch.setenv("FORGEARR_ENGINES__REPLICAS", "0")
    yield
    await get_database().close()


@pytest.fixture
def ollama(registry_model: RegistryModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOllama]:
    with running_fake_ollama() as server:
        monkeypatch.setenv("FORGEARR_OLLAMA__URL", server.url)
        get_settings.cache_clear()
        yield server


async def run(
    registry_model: RegistryModel, version: int, *, force: bool = False, link: RecordingLink | None = None
) -> dict[str, Any]:
    return await run_spec(DeploySpec(name=registry_model.name, version=version, force=force), link or RecordingLink())


async def run_spec(spec: DeploySpec, link: RecordingLink) -> dict[str, Any]:
    async with get_database().transaction() as session:
        request = JobRequest(kind="deploy", spec=spec.model_dump(mode="json"))
        job = await queue.enqueue(session, request, LOCAL)
    claim = Claim(job.id, "t", "deploy", {}, None, 1, 3, None, None, {}, "w", None)
    return await asyncio.to_thread(deploy_job.deploy, Context(claim, link), spec)


async def passed_version(registry_model: RegistryModel, content: bytes = b"") -> int:
    version = await registry_model.register(content) if content else await registry_model.register()
    await registry_model.pass_validation(version.number)
    return version.number


async def test_a_deployment_moves_the_alias_and_a_rollback_moves_it_back(registry_model: RegistryModel) -> None:
    for number in (1, 2):
        await passed_version(registry_model)
        link = RecordingLink()
        result = await run(registry_model, number, link=link)
        version = await registry_model.registry.find(f"{registry_model.name}:latest")
        assert version.number == number
        assert result == {
            "name": registry_model.name,
            "model_name": f"{registry_model.name}:latest",
            "version": number,
            "previous": number - 1 or None,
            "gguf_path": str(model_cache.find(version.files[0].sha256, version.files[0].bytes)),
            "ollama": None,
        }
        assert link.phases == ["fetching", "loading", "switching"]
        assert link.logged == ["No engine is configured (engines.replicas is 0), so none loads it."]
    # A repeated attempt changes nothing.
    assert (await run(registry_model, 2))["previous"] == 1
    version, replaced, left_to_do = await deploy_job.roll_back(registry_model.name)
    assert (version.number, replaced, left_to_do) == (1, 2, None)
    with pytest.raises(NoEarlierVersion):
        await deploy_job.roll_back(registry_model.name)


async def test_a_version_that_did_not_pass_is_deployed_only_with_force(registry_model: RegistryModel) -> None:
    await registry_model.register()
    with pytest.raises(VersionNotPassed, match="never validated"):
        await run(registry_model, 1)
    await registry_model.registry.set_validation(registry_model.name, 1, False, ["rouge_l 0.1 is under 0.5"])
    with pytest.raises(VersionNotPassed, match=r"rouge_l 0\.1 is under 0\.5"):
        await run(registry_model, 1)
    with pytest.raises(ModelNotFound):
        await registry_model.registry.find(f"{registry_model.name}:latest")
    link = RecordingLink()
    assert (await run(registry_model, 1, force=True, link=link))["version"] == 1
    assert "by force" in link.logged[0]
    with pytest.raises(ModelNotFound):
        await run(registry_model, 7)
    async with get_database().read_transaction() as session:
        entries = list(await session.scalars(select(AuditLogEntry).order_by(AuditLogEntry.id)))
    assert {(entry.action, entry.actor) for entry in entries} == {("model.deploy", "local")}
    first, seventh = (f"{registry_model.name}:v{number}" for number in (1, 7))
    recorded = [(entry.outcome, entry.target) for entry in entries]
    assert recorded == [("refused", first), ("refused", first), ("succeeded", first), ("failed", seventh)]
    details = [entry.details or {} for entry in entries]
    assert "never validated" in details[0]["reason"]
    assert details[2]["forced"]


async def test_a_version_can_be_named_by_its_export(registry_model: RegistryModel) -> None:
    await registry_model.register()
    version = await registry_model.register()
    spec = DeploySpec(export_job_id=version.export_job_id, force=True)
    result = await run_spec(spec, RecordingLink())
    assert (result["name"], result["version"], result["previous"]) == (registry_model.name, 2, None)
    for unknown in ("job_unknown", "' OR name LIKE '%"):
        with pytest.raises(ModelNotFound):
            await run_spec(DeploySpec(export_job_id=unknown), RecordingLink())


async def test_ollama_receives_file_template_and_parameters_once(
    registry_model: RegistryModel, ollama: FakeOllama, tmp_path: Path
) -> None:
    contents = [gguf(tmp_path / str(context), CHAT_TEMPLATE, context) for context in (512, 100_000)]
    for number, content in enumerate(contents, 1):
        await passed_version(registry_model, content)
        result = await run(registry_model, number)
        version = await registry_model.registry.find(registry_model.name)
        digest = f"sha256:{version.files[0].sha256}"
        assert result["ollama"] == {
            "url": ollama.url,
            "model": version.reference,
            "latest": f"{registry_model.name}:latest",
            "digest": digest,
        }
        model = ollama.models[version.reference]
        assert model["files"] == {version.files[0].name: digest}
        assert ollama.models[f"{registry_model.name}:latest"] == model
        assert model["parameters"]["stop"] == ["<|im_start|>", "<|im_end|>"]
        assert model["parameters"]["num_ctx"] == min(512 if number == 1 else 100_000, get_settings().engines.context)
        assert "{{- range .Tools }}" in model["template"]
        assert model["template"].endswith("{{ .Response }}")
    await run(registry_model, 2)
    assert ollama.uploads == 2
    _, _, left_to_do = await deploy_job.roll_back(registry_model.name)
    assert left_to_do is None
    assert ollama.models[f"{registry_model.name}:latest"] == ollama.models[f"{registry_model.name}:v1"]


async def test_an_unknown_template_is_left_to_ollama(
    registry_model: RegistryModel, ollama: FakeOllama, tmp_path: Path
) -> None:
    await passed_version(registry_model, gguf(tmp_path / "file", "[INST] {{ messages[0].content }} [/INST]", 512))
    await run(registry_model, 1)
    model = ollama.models[f"{registry_model.name}:v1"]
    assert "template" not in model
    assert model["parameters"] == {"num_ctx": 512}


async def test_the_alias_moves_only_after_ollama_has_the_model(
    registry_model: RegistryModel, ollama: FakeOllama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for context in (512, 1024):
        await passed_version(registry_model, gguf(tmp_path / str(context), CHAT_TEMPLATE, context))
    await run(registry_model, 1)
    ollama.broken = "unsupported architecture"
    with pytest.raises(OllamaRefused, match="unsupported architecture"):
        await run(registry_model, 2)
    assert (await registry_model.registry.find(registry_model.name)).number == 1
    assert ollama.models[f"{registry_model.name}:latest"] == ollama.models[f"{registry_model.name}:v1"]

    monkeypatch.setenv("FORGEARR_OLLAMA__URL", "http://127.0.0.1:9")
    get_settings.cache_clear()
    with pytest.raises(OllamaUnavailable) as unavailable:
        await run(registry_model, 2)
    assert unavailable.value.retryable
    assert (await registry_model.registry.find(registry_model.name)).number == 1


async def test_a_rollback_does_not_wait_for_ollama(
    registry_model: RegistryModel, ollama: FakeOllama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        await passed_version(registry_model, gguf(tmp_path / str(number), CHAT_TEMPLATE, 512 * number))
        await run(registry_model, number)
    monkeypatch.setenv("FORGEARR_OLLAMA__URL", "http://127.0.0.1:9")
    get_settings.cache_clear()
    version, _, left_to_do = await deploy_job.roll_back(registry_model.name)
    assert version.number == 1
    assert left_to_do is not None
    assert "127.0.0.1:9" in left_to_do
    assert (await registry_model.registry.find(registry_model.name)).number == 1


async def test_a_retired_model_is_no_longer_latest_on_ollama(
    registry_model: RegistryModel, ollama: FakeOllama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await passed_version(registry_model, gguf(tmp_path / "file", CHAT_TEMPLATE, 512))
    for _ in range(2):
        await run(registry_model, 1)
        version, left_to_do = await deploy_job.retire(registry_model.name)
        assert (version.number, left_to_do) == (1, None)
        assert ollama.models.keys() == {f"{registry_model.name}:v1"}
        with pytest.raises(ModelNotFound):
            await registry_model.registry.find(registry_model.name)
    # Somebody has removed it there already; or the server is away, for which a retirement does not wait.
    await run(registry_model, 1)
    del ollama.models[f"{registry_model.name}:latest"]
    assert (await deploy_job.retire(registry_model.name))[1] is None
    await run(registry_model, 1)
    monkeypatch.setenv("FORGEARR_OLLAMA__URL", "http://127.0.0.1:9")
    get_settings.cache_clear()
    _, left_to_do = await deploy_job.retire(registry_model.name)
    assert left_to_do is not None
    assert "127.0.0.1:9" in left_to_do


def test_the_fake_ollama_checks_digests() -> None:
    with running_fake_ollama() as server:
        refused = httpx.post(f"{server.url}/api/blobs/sha256:{'0' * 64}", content=b"something else", timeout=TIMEOUT)
        assert refused.status_code == 400


def gguf(path: Path, template: str, context: int) -> bytes:
    """Make a GGUF with all the metadata that a push reads."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(context)
    writer.add_chat_template(template)
    writer.add_tensor("token_embd.weight", numpy.zeros((2, 2), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()
