"""Exports of trained models with llama.cpp's converter to a real MLflow."""

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
from safetensors.numpy import load_file

from cluster.errors import NotFound
from cluster.files.disk import DiskFull
from cluster.settings import get_settings
from jobs.context import StopJob
from jobs.execution import isolated, workspace
from jobs.outputs import OutputMissing
from jobs.queue import JobNotFound
from jobs.states import State
from jobs.tables import Job
from pipelines.training.export import convert
from pipelines.training.export import llama_converter as export_llama_converter
from pipelines.training.export.convert import UnsupportedModel
from pipelines.training.export.job import ExportNotTracked, NoAdapter
from pipelines.training.export.llama_converter import ConverterNotFound, ConverterUnavailable
from pipelines.training.export.quantize import BrokenModelFile, finish
from pipelines.training.fine_tune import recipe
from pipelines.training.models import base_models, registry
from pipelines.training.models import cache as model_cache
from pipelines.training.models.base_models import BaseModelNotFound
from pipelines.training.models.remote_code import ModelHasCode
from pipelines.training.models.versions import ModelFile, ModelNotFound, RegistryDisabled, Version
from pipelines.training.spec import FineTuneSpec
from tests.pipelines.training.export import crashing_steps
from tests.support.job_harness import JobHarness
from tests.support.recording_link import RecordingLink
from tests.support.training import SilentObserver, chats

QUANTIZATIONS = ["q4_k_m", "q8_0", "f16", "bf16", "q6_k", "q5_k_m", "q4_0"]
WEIGHT = "model.layers.0.mlp.up_proj.weight"


def test_an_adapter_is_merged_and_exported_in_every_quantization(harness: JobHarness, trained: Path) -> None:
    for name in ("ada", "bob"):
        harness.add_user(name)
    fine_tune = harness.fine_tuned("lora", owner_id="ada")
    spec = {"job_id": fine_tune, "quantizations": QUANTIZATIONS, "adapter": True, "name": "all-types"}
    job_id, result, link = harness.run("export", spec, owner_id="ada")
    version = find(f"all-types:v{result['version']}")
    assert (version.job_id, version.export_job_id, version.run_id) == (fine_tune, job_id, result["run_id"])
    assert [file.quantization for file in version.files] == QUANTIZATIONS
    assert [file["name"] for file in result["files"]] == [
        f"all-types-{quantization}.gguf" for quantization in QUANTIZATIONS
    ]
    sizes = {file["quantization"]: file["bytes"] for file in result["files"]}
    assert sorted(sizes, key=sizes.__getitem__)[:3] == ["q4_0", "q4_k_m", "q5_k_m"]
    assert all(file["seconds"] > 0 for file in result["files"])
    # The file that will be served comes first, and is already in the cache.
    assert model_cache.find(result["files"][0]["sha256"], result["files"][0]["bytes"]) is not None
    for entry, file in zip([*result["files"], result["adapter"]], [*version.files, version.adapter], strict=True):
        content = fetch(version, file).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        assert len(content) == entry["bytes"]

    expected = merged_weight(trained / "lora")
    assert not numpy.allclose(expected, weight(base_models.resolve("forgearr/tiny")), atol=1e-3), "nothing was learned"
    by_type = {file.quantization: fetch(version, file) for file in version.files}
    numpy.testing.assert_allclose(tensor(by_type["f16"]), expected, atol=2e-4)
    numpy.testing.assert_allclose(tensor(by_type["q8_0"]), expected, atol=2e-3)
    assert version.adapter is not None
    reader = gguf.GGUFReader(fetch(version, version.adapter))
    assert "blk.0.ffn_up.weight.lora_a" in {tensor.name for tensor in reader.tensors}

    assert link.progress == sorted(link.progress)
    assert (link.progress[0], link.progress[-1]) == (0, 100)
    assert leftovers() == []

    # The version can be the base model of the next training. Its weights are merged once.
    folder = base_models.resolve(version.reference)
    numpy.testing.assert_allclose(weight(folder), expected, atol=1e-6)
    assert base_models.resolve(version.reference) == folder
    with pytest.raises(ModelNotFound):
        base_models.resolve("all-types:v99")

    # It is its owner's until it is served.
    assert (version.owner_id, version.visibility) == ("ada", "private")
    assert base_models.pin_reference(version.reference, "ada") == version.reference
    with pytest.raises(ModelNotFound):
        base_models.pin_reference(version.reference, "bob")

    # A training pins the version, so a later deployment does not affect it.
    asyncio.run(serve(version))
    assert base_models.pin_reference("all-types:latest", "bob") == version.reference
    assert base_models.pin_reference("forgearr/tiny", "bob") == "forgearr/tiny"


@pytest.mark.deep
def test_a_base_model_in_four_bits_is_trained_and_exported(harness: JobHarness, trained: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = tmp_path / "tiny-bnb-4bit"
    quantized: Any = AutoModelForCausalLM.from_pretrained(
        base_models.resolve("forgearr/tiny"), quantization_config=bits
    )
    quantized.save_pretrained(base)
    AutoTokenizer.from_pretrained(base_models.resolve("forgearr/tiny")).save_pretrained(base)

    def train(**values: Any) -> recipe.TrainingResult:
        options = {"data": {"dataset": "any"}, "max_steps": 3, "batch_size": 2, "eval_split": 0, **values}
        spec = FineTuneSpec.model_validate({"base_model": "packed", "learning_rate": 0.01, **options})
        return recipe.train(spec, chats(8), base=str(base), work_folder=tmp_path / "work", observer=SilentObserver())

    with pytest.raises(recipe.QuantizedBase, match="packed is quantized, so its own weights"):
        train(tuning="full")
    model = train(tuning="qlora").model
    lines = [sample.model_dump_json(exclude_none=True) for sample in chats(1)]
    (model / "held_out.jsonl").write_text("\n".join(lines))
    model.rename(trained / "packed")
    fine_tune = harness.fine_tuned("packed", base_model=str(base))
    shutil.rmtree(trained / "packed")
    _, result, _ = harness.run("export", {"job_id": fine_tune, "quantizations": ["f16"], "adapter": True})
    exported = find(f"{result['name']}:v1")
    numpy.testing.assert_allclose(
        tensor(fetch(exported, exported.files[0])), weight(base_models.resolve("forgearr/tiny")), atol=0.1
    )
    assert exported.adapter is not None
    harness.run("validate", {"job_id": fine_tune, "max_samples": 1, "max_new_tokens": 2})


@pytest.mark.deep
def test_one_file_of_a_full_model_needs_only_the_converter(harness: JobHarness, trained: Path) -> None:
    fine_tune = harness.fine_tuned("full")
    _, result, link = harness.run("export", {"job_id": fine_tune})
    version = find(f"{result['name']}:v1")
    assert [file.quantization for file in version.files] == ["q8_0"]
    assert version.adapter is None
    assert result["adapter"] is None
    numpy.testing.assert_allclose(tensor(fetch(version, version.files[0])), weight(trained / "full"), atol=2e-3)
    assert not [phase for phase in phases(link) if phase.startswith(("merging", "quantizing"))]


def test_a_job_that_cannot_be_exported_is_refused(harness: JobHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoAdapter, match="has trained the whole model"):
        harness.run("export", {"job_id": harness.fine_tuned("full"), "adapter": True})
    with pytest.raises(JobNotFound):
        harness.run("export", {"job_id": "job_20260101_000000_none"})
    harness.add_user("bob")
    with pytest.raises(JobNotFound):
        harness.run("export", {"job_id": harness.fine_tuned("full", owner_id="alice")}, owner_id="bob")
    running = harness.add(Job(id="job_20260101_000000_run1", kind="fine_tune", state=State.RUNNING))
    with pytest.raises(OutputMissing, match="running"):
        harness.run("export", {"job_id": running})
    with pytest.raises(OutputMissing, match="'export'"):
        harness.run("export", {"job_id": harness.start("export", {"job_id": "job_x"})[0]})
    with pytest.raises(BaseModelNotFound, match="not a folder on this machine"):
        harness.run("export", {"job_id": harness.fine_tuned("lora", base_model="/nowhere/at/all")})
    job_id, link = harness.start("export", {"job_id": "job_x"}, tracked=False)
    with pytest.raises(ExportNotTracked):
        harness.resume("export", {"job_id": "job_x"}, job_id, link)
    monkeypatch.setenv("FORGEARR_MLFLOW__ENABLED", "false")
    get_settings.cache_clear()
    with pytest.raises(RegistryDisabled):
        harness.resume("export", {"job_id": "job_x"}, job_id, link)


@pytest.mark.deep
def test_a_tokenizer_that_llama_cpp_does_not_support_is_refused(harness: JobHarness, trained: Path) -> None:
    model = trained / "odd"
    shutil.copytree(trained / "full", model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    byte_level = tokenizer["pre_tokenizer"]
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    fine_tune = harness.fine_tuned("odd")
    shutil.rmtree(model)
    with pytest.raises(UnsupportedModel, match="pre-tokenizer Sequence"):
        harness.run("export", {"job_id": fine_tune})
    assert leftovers() == []


@pytest.mark.deep
def test_a_cancelled_export_leaves_no_files_and_no_version(harness: JobHarness) -> None:
    spec = {"job_id": harness.fine_tuned("lora"), "name": "cancelled"}
    job_id, link = harness.start("export", spec)
    context = harness.context(job_id, link)
    seen: list[list[str]] = []

    def cancel(phase: str) -> None:
        if phase == "merging":
            seen.append(leftovers())
            context.stop("cancel")

    link.on_report = cancel
    with pytest.raises(StopJob):
        harness.call("export", spec, context)
    assert seen
    assert seen[0], "the export has not begun"
    assert leftovers() == []
    assert not children()
    with pytest.raises(ModelNotFound):
        find("cancelled:v1")


@pytest.mark.deep
def test_a_paused_export_repeats_its_step(harness: JobHarness) -> None:
    spec = {"job_id": harness.fine_tuned("full")}
    job_id, link = harness.start("export", spec)
    context = harness.context(job_id, link)
    link.on_report = lambda phase: context.stop("pause") if phase == "converting" else None
    with pytest.raises(StopJob, match="pause"):
        harness.call("export", spec, context)
    assert leftovers() == []
    link.on_report = lambda phase: None
    assert harness.resume("export", spec, job_id, link)["version"] == 1


@pytest.mark.deep
def test_too_little_disk_space_is_noticed_before_the_export(
    harness: JobHarness, home: Path, small_disk: Callable[..., None]
) -> None:
    (home / "work").mkdir()
    small_disk(home / "work", megabytes=20)
    with pytest.raises(DiskFull, match=f"needs 0.0. GB in {home}/work/job_"):
        harness.run("export", {"job_id": harness.fine_tuned("lora")})
    assert leftovers() == []


@pytest.mark.deep
def test_a_disk_that_becomes_full_fails_the_export(
    harness: JobHarness, home: Path, small_disk: Callable[..., None]
) -> None:
    (home / "work").mkdir()
    small_disk(home / "work", megabytes=60)
    spec = {"job_id": harness.fine_tuned("lora"), "name": "filled", "quantizations": ["q4_0", "q8_0"]}
    job_id, link = harness.start("export", spec)

    def fill(phase: str) -> None:
        """Fill the disk, as another program might."""
        if phase == "merging" and not (home / "work" / "other").exists():
            with (home / "work" / "other").open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(100_000))

    link.on_report = fill
    with pytest.raises(DiskFull, match="became full"):
        harness.resume("export", spec, job_id, link)
    assert leftovers() == ["other"]
    with pytest.raises(ModelNotFound):
        find("filled:v1")


@pytest.mark.deep
@pytest.mark.parametrize("damage", ["cut", "garbage", "scrambled", "missing"])
def test_a_broken_file_fails_verification(
    home: Path, tmp_path: Path, trained: Path, complete_file: Path, damage: str
) -> None:
    file = tmp_path / "model.gguf"
    content = bytearray(complete_file.read_bytes())
    match damage:
        case "cut":
            file.write_bytes(content[: len(content) // 2])
        case "garbage":
            file.write_bytes(os.urandom(100_000))
        case "scrambled":
            content[2_000_000:] = b"\xff" * (len(content) - 2_000_000)  # weights that are NaN
            file.write_bytes(content)
        case _:
            pass
    with pytest.raises(BrokenModelFile, match=str(file)):
        verify(file)


@pytest.mark.deep
def test_a_complete_file_passes_verification(home: Path, complete_file: Path) -> None:
    assert verify(complete_file)[0]["fallbacks"] == 0


def test_the_error_of_a_crashed_step_has_its_last_output(home: Path) -> None:
    with pytest.raises(isolated.StepFailed, match=r"signal 6 while starting: .*Last words"):
        step(crashing_steps.abort)
    with pytest.raises(isolated.StepFailed, match=r"ended with 1 while starting: .*KeyError: 'nowhere'"):
        step(crashing_steps.fail)
    with pytest.raises(NotFound, match="as it was raised"):
        step(crashing_steps.refuse)
    assert step(crashing_steps.chatter) == {"heard": True}


def test_nothing_that_comes_with_a_model_runs(home: Path, tmp_path: Path, llama_converter: Path) -> None:
    """llama.cpp's converter trusts the code of some architectures, among them GLM-4."""
    from transformers import AutoTokenizer, Glm4Config, Glm4ForCausalLM

    marker, folder = tmp_path / "it-ran", tmp_path / "glm"
    tokenizer: Any = AutoTokenizer.from_pretrained(base_models.resolve("forgearr/tiny"))
    sizes: dict[str, Any] = {
        "pad_token_id": 0,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "head_dim": 32,
    }
    config = Glm4Config(vocab_size=len(tokenizer), num_attention_heads=2, num_key_value_heads=2, **sizes)
    Glm4ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "tok.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: ...\n")
    described = json.loads((folder / "tokenizer_config.json").read_text())
    described["auto_map"] = {"AutoTokenizer": ["tok.Evil", "tok.Evil"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))

    request = {"model": str(folder), "base": None, "file": str(tmp_path / "glm.gguf"), "outtype": "f16"}
    paths = [llama_converter / "gguf-py", llama_converter]
    with pytest.raises(ModelHasCode, match="code of its own"):
        step(convert.convert, {**request, "adapter_file": None, "work": str(tmp_path)}, paths)
    assert not marker.exists()


def test_a_step_sees_no_secret(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("FORGEARR_DATABASE__URL", "postgresql://ada:secret@db/forge")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    environment = step(crashing_steps.environment)
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert "secret" not in json.dumps(environment)


def test_what_a_killed_job_has_left_is_removed_by_the_next(home: Path) -> None:
    script = "import os; from jobs.execution import workspace\nwith workspace.temporary_folder('dead'): os._exit(9)"
    subprocess.run([sys.executable, "-c", script], check=False)
    assert len(leftovers()) == 2
    with workspace.temporary_folder("alive") as first:
        assert {name.partition("-")[0] for name in leftovers()} == {"alive"}
        with workspace.temporary_folder("other"):
            assert first.exists()
    assert leftovers() == []


def test_a_converter_that_cannot_be_found_has_a_reason(
    home: Path, tmp_path: Path, llama_converter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (llama_converter / "convert_hf_to_gguf.py").exists()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ConverterUnavailable, match=r"set forge\.converter to a folder"):
        export_llama_converter.locate_converter()
    monkeypatch.setitem(export_llama_converter.HASHES, version(export_llama_converter.PACKAGE), "0" * 64)
    with pytest.raises(ConverterUnavailable):
        export_llama_converter.locate_converter()
    with pytest.raises(ConverterUnavailable, match=r"hash of .* 0\.0\.1 is unknown"):
        export_llama_converter.fetch("0.0.1", tmp_path / "none")
    assert list((home / "cache").iterdir()) == []
    monkeypatch.setenv("FORGEARR_FORGE__CONVERTER", str(tmp_path))
    get_settings.cache_clear()
    with pytest.raises(ConverterNotFound, match="convert_hf_to_gguf"):
        export_llama_converter.locate_converter()


def test_a_package_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(export_llama_converter.HASHES, version(export_llama_converter.PACKAGE), "0" * 64)
    with pytest.raises(ConverterUnavailable, match="DO NOT MATCH THE HASHES"):
        export_llama_converter.fetch(version(export_llama_converter.PACKAGE), tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_base_model_is_named(home: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseModelNotFound, match=r"no config\.json and no \*\.safetensors"):
        base_models.resolve(str(tmp_path))
    with pytest.raises(BaseModelNotFound, match="neither forgearr/tiny, a folder"):
        base_models.resolve("no such/thing/at all")
    # The library reads the hub's address at import, so this runs in another process.
    script = "from pipelines.training.models import base_models; base_models.resolve('somebody/some-model')"
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert "BaseModelNotFound: The base model 'somebody/some-model' is not on this machine" in process.stderr


@pytest.fixture(scope="session")
def complete_file(trained: Path, llama_converter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model as a valid GGUF."""
    file = tmp_path_factory.mktemp("whole") / "whole.gguf"
    request = {"model": str(trained / "full"), "base": None, "file": str(file), "outtype": "f16"}
    step(
        convert.convert,
        {**request, "adapter_file": None, "work": str(file.parent)},
        paths=[llama_converter / "gguf-py", llama_converter],
    )
    return file


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Mounts a disk of this many megabytes at a folder, until the end of the test. All of it may be used."""
    monkeypatch.setenv("FORGEARR_STORAGE__MIN_FREE_MB", "0")
    get_settings.cache_clear()
    mounted: list[Path] = []

    def mount(folder: Path, megabytes: int) -> None:
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        if os.getuid() or subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("only an administrator of the machine can mount a small disk")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def step(function: Callable[..., Any], request: dict[str, Any] | None = None, paths: list[Path] | None = None) -> Any:
    progress: list[float] = []
    return isolated.run_isolated(
        function,
        request or {},
        report=lambda part, phase: progress.append(part),
        should_stop=lambda: False,
        threads=1,
        paths=paths or [],
    )


def verify(file: Path) -> Any:
    files = [{"path": str(file), "quantization": "f16"}]
    request = {"source": str(file), "files": files, "adapter": None, "threads": 1}
    return step(finish, request)


def find(reference: str) -> Version:
    async def read() -> Version:
        async with registry.connect() as models:
            return await models.find(reference)

    return asyncio.run(read())


async def serve(version: Version) -> None:
    async with registry.connect() as models:
        await models.set_served(version.name, version.number)


def fetch(version: Version, file: ModelFile | None) -> Path:
    async def load() -> Path:
        async with registry.connect() as models:
            return await models.fetch(version, file)

    return asyncio.run(load())


def weight(folder: Path | str) -> Any:
    return load_file(Path(folder) / "model.safetensors")[WEIGHT]


def merged_weight(adapter: Path) -> Any:
    """Compute the weight with the adapter's change added, as LoRA defines it."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    parts = load_file(adapter / "adapter_model.safetensors")
    first, second = (parts[f"base_model.model.{WEIGHT.replace('.weight', f'.lora_{part}.weight')}"] for part in "AB")
    return weight(base_models.resolve("forgearr/tiny")) + config["lora_alpha"] / config["r"] * second @ first


def tensor(file: Path) -> Any:
    (match,) = [candidate for candidate in gguf.GGUFReader(file).tensors if candidate.name == "blk.0.ffn_up.weight"]
    return gguf.dequantize(match.data, match.tensor_type)


def phases(link: RecordingLink) -> list[str]:
    return [data["phase"] for _, data in link.events if "phase" in data]


def leftovers() -> list[str]:
    from cluster.settings import home

    folder = home() / "work"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def children() -> list[str]:
    import psutil

    return [
        " ".join(child.cmdline())
        for child in psutil.Process().children()
        if "jobs.execution.isolated" in child.cmdline()
    ]
