"""Deploying and rolling back: what is refused, in which order things happen, and what Ollama gets."""

import asyncio
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
from gguf import GGUFWriter

from cluster.settings import get_settings
from jobs.context import Context
from jobs.leases import Claim
from jobs.registry import Resources
from jobs.tables import Job
from pipelines.training.deploy import job as deploy_job
from pipelines.training.deploy.job import VersionNotPassed
from pipelines.training.deploy.ollama_push import OllamaRefused, OllamaUnavailable
from pipelines.training.models import cache as model_cache
from pipelines.training.models.versions import ModelNotFound, NoEarlierVersion
from pipelines.training.spec import DeploySpec
from tests.support.fake_ollama import OllamaServer, running_ollama
from tests.support.registry_model import Shelf
from tests.support.waiting import PATIENCE

CHAT_TEMPLATE = files("configs").joinpath("tiny/chat_template.jinja").read_text()


class Notebook:
    """A worker that writes down what its job says."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.lines: list[str] = []

    def report(self, claim: Claim, values: Mapping[str, Any], event: tuple[str, dict[str, Any]]) -> None:
        if phase := values.get("phase"):
            self.phases.append(phase)
        if event[0] == "log":
            self.lines.append(event[1]["message"])

    def checkpoint(self, claim: Claim, state: Any) -> None: ...
    def artifact(self, claim: Claim, path: Path, name: str) -> str:
        return str(path)

    def child(self, claim: Claim, name: str, kind: str, spec: Mapping[str, Any], resources: Resources | None) -> Job:
        raise AssertionError("a deploy has no children")


@pytest.fixture(autouse=True)
def no_engine(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_ENGINES__REPLICAS", "0")


@pytest.fixture
def ollama(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> Iterator[OllamaServer]:
    with running_ollama() as server:
        monkeypatch.setenv("FORGEARR_OLLAMA__URL", server.url)
        get_settings.cache_clear()
        yield server


async def run(shelf: Shelf, version: int, *, force: bool = False, notebook: Notebook | None = None) -> dict[str, Any]:
    return await run_spec(DeploySpec(name=shelf.name, version=version, force=force), notebook or Notebook())


async def run_spec(spec: DeploySpec, notebook: Notebook) -> dict[str, Any]:
    claim = Claim("job_d", "t", "deploy", {}, None, 1, 3, None, None, {}, "w", None)
    return await asyncio.to_thread(deploy_job.deploy, Context(claim, notebook), spec)


async def passed_version(shelf: Shelf, content: bytes = b"") -> int:
    version = await shelf.register(content) if content else await shelf.register()
    await shelf.registry.set_validation(shelf.name, version.number, True)
    return version.number


async def test_the_alias_moves_and_comes_back(shelf: Shelf) -> None:
    for number in (1, 2):
        await passed_version(shelf)
        notebook = Notebook()
        result = await run(shelf, number, notebook=notebook)
        version = await shelf.registry.find(f"{shelf.name}:latest")
        assert version.number == number
        assert result == {
            "name": shelf.name,
            "model_name": f"{shelf.name}:latest",
            "version": number,
            "previous": number - 1 or None,
            "gguf_path": str(model_cache.find(version.files[0].sha256, version.files[0].bytes)),
            "ollama": None,
        }
        assert notebook.phases == ["fetching", "loading", "switching"]
        assert notebook.lines == ["No engine is configured (engines.replicas is 0), so none loads it."]
    # An attempt that is made again after all was done changes nothing.
    assert (await run(shelf, 2))["previous"] == 1
    version, replaced, left_to_do = await deploy_job.roll_back(shelf.name)
    assert (version.number, replaced, left_to_do) == (1, 2, None)
    with pytest.raises(NoEarlierVersion):
        await deploy_job.roll_back(shelf.name)


async def test_what_did_not_pass_is_refused_unless_it_is_forced(shelf: Shelf) -> None:
    await shelf.register()
    with pytest.raises(VersionNotPassed, match="never validated"):
        await run(shelf, 1)
    await shelf.registry.set_validation(shelf.name, 1, False, ["rouge_l 0.1 is under 0.5"])
    with pytest.raises(VersionNotPassed, match=r"rouge_l 0\.1 is under 0\.5"):
        await run(shelf, 1)
    with pytest.raises(ModelNotFound):
        await shelf.registry.find(f"{shelf.name}:latest")
    notebook = Notebook()
    assert (await run(shelf, 1, force=True, notebook=notebook))["version"] == 1
    assert "by force" in notebook.lines[0]
    with pytest.raises(ModelNotFound):
        await run(shelf, 7)


async def test_a_version_may_be_named_by_its_export(shelf: Shelf) -> None:
    await shelf.register()
    version = await shelf.register()
    spec = DeploySpec(export_job_id=version.export_job_id, force=True)
    result = await run_spec(spec, Notebook())
    assert (result["name"], result["version"], result["previous"]) == (shelf.name, 2, None)
    for unknown in ("job_unknown", "' OR name LIKE '%"):
        with pytest.raises(ModelNotFound):
            await run_spec(DeploySpec(export_job_id=unknown), Notebook())


async def test_ollama_gets_file_template_and_parameters_once(
    shelf: Shelf, ollama: OllamaServer, tmp_path: Path
) -> None:
    contents = [gguf(tmp_path / str(context), CHAT_TEMPLATE, context) for context in (512, 100_000)]
    for number, content in enumerate(contents, 1):
        await passed_version(shelf, content)
        result = await run(shelf, number)
        version = await shelf.registry.find(shelf.name)
        digest = f"sha256:{version.files[0].sha256}"
        assert result["ollama"] == {
            "url": ollama.url,
            "model": version.reference,
            "latest": f"{shelf.name}:latest",
            "digest": digest,
        }
        made = ollama.models[version.reference]
        assert made["files"] == {version.files[0].name: digest}
        assert ollama.models[f"{shelf.name}:latest"] == made
        assert made["parameters"]["stop"] == ["<|im_start|>", "<|im_end|>"]
        assert made["parameters"]["num_ctx"] == min(512 if number == 1 else 100_000, get_settings().engines.context)
        assert "{{- range .Tools }}" in made["template"]
        assert made["template"].endswith("{{ .Response }}")
    await run(shelf, 2)
    assert ollama.uploads == 2
    _, _, left_to_do = await deploy_job.roll_back(shelf.name)
    assert left_to_do is None
    assert ollama.models[f"{shelf.name}:latest"] == ollama.models[f"{shelf.name}:v1"]


async def test_the_template_of_other_models_is_left_to_ollama(
    shelf: Shelf, ollama: OllamaServer, tmp_path: Path
) -> None:
    await passed_version(shelf, gguf(tmp_path / "file", "[INST] {{ messages[0].content }} [/INST]", 512))
    await run(shelf, 1)
    made = ollama.models[f"{shelf.name}:v1"]
    assert "template" not in made
    assert made["parameters"] == {"num_ctx": 512}


async def test_nothing_is_switched_before_ollama_has_it(
    shelf: Shelf, ollama: OllamaServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for context in (512, 1024):
        await passed_version(shelf, gguf(tmp_path / str(context), CHAT_TEMPLATE, context))
    await run(shelf, 1)
    ollama.broken = "unsupported architecture"
    with pytest.raises(OllamaRefused, match="unsupported architecture"):
        await run(shelf, 2)
    assert (await shelf.registry.find(shelf.name)).number == 1
    assert ollama.models[f"{shelf.name}:latest"] == ollama.models[f"{shelf.name}:v1"]

    monkeypatch.setenv("FORGEARR_OLLAMA__URL", "http://127.0.0.1:9")
    get_settings.cache_clear()
    with pytest.raises(OllamaUnavailable) as away:
        await run(shelf, 2)
    assert away.value.retryable
    assert (await shelf.registry.find(shelf.name)).number == 1


async def test_a_rollback_does_not_wait_for_ollama(
    shelf: Shelf, ollama: OllamaServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        await passed_version(shelf, gguf(tmp_path / str(number), CHAT_TEMPLATE, 512 * number))
        await run(shelf, number)
    monkeypatch.setenv("FORGEARR_OLLAMA__URL", "http://127.0.0.1:9")
    get_settings.cache_clear()
    version, _, left_to_do = await deploy_job.roll_back(shelf.name)
    assert version.number == 1
    assert left_to_do is not None
    assert "127.0.0.1:9" in left_to_do
    assert (await shelf.registry.find(shelf.name)).number == 1


def test_the_stand_in_checks_what_it_gets() -> None:
    with running_ollama() as server:
        refused = httpx.post(f"{server.url}/api/blobs/sha256:{'0' * 64}", content=b"something else", timeout=PATIENCE)
        assert refused.status_code == 400


def gguf(path: Path, template: str, context: int) -> bytes:
    """A file that says all that a push reads from it."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(context)
    writer.add_chat_template(template)
    writer.add_tensor("token_embd.weight", numpy.zeros((2, 2), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()
