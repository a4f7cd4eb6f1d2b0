"""The kind `export`: convert a trained model to GGUF files, quantize and verify them, and register them as a version.

torch and llama.cpp run in processes of their own (jobs/execution/isolated.py). The model is converted once. If only one
16-bit or q8_0 file is requested, the converter writes it directly. Otherwise it writes a 16-bit file, and llama.cpp
quantizes that one.
"""

import asyncio
import json
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.db import Database, run_with_database
from cluster.errors import ForgearrError, Unavailable, UnprocessableRequest
from cluster.files import disk
from cluster.identity import User
from cluster.ownership import Principal
from cluster.settings import get_settings
from jobs import outputs
from jobs.context import Context
from jobs.execution import isolated, workspace
from jobs.outputs import JobOutput
from jobs.registry import Resources, job
from pipelines.training.export import convert, llama_converter, quantize
from pipelines.training.models import base_models, names, registry
from pipelines.training.models import cache as model_cache
from pipelines.training.models.versions import ModelFile, RegistryDisabled, Version
from pipelines.training.spec import ExportSpec, Quantization

BITS_PER_WEIGHT: dict[Quantization, float] = {
    "f16": 16,
    "bf16": 16,
    "q8_0": 8.6,
    "q6_k": 6.9,
    "q5_k_m": 6.2,
    "q4_k_m": 5.6,
    "q4_0": 5.3,
}
"""The largest size of a weight, to check in advance whether a file fits on the disk."""
CONVERTER_QUANTIZATIONS = {"f16", "bf16", "q8_0"}
RUN_TIMEOUT_SECONDS = 120
"""The maximum time to wait for the job's MLflow run, which is created some seconds after the job starts."""


class NoAdapter(UnprocessableRequest):
    """The model was trained in full, so there is no adapter to export."""

    code = "NO_ADAPTER"


class ExportNotTracked(UnprocessableRequest):
    """An export belongs to a run in MLflow, which holds its files: submit it as a tracked job."""

    code = "EXPORT_NOT_TRACKED"


class RunMissing(Unavailable):
    """The job's run has not appeared in MLflow."""

    code = "MLFLOW_RUN_MISSING"


@job("export", spec=ExportSpec, resources=Resources(cpus=1), tracked=True)
def export(context: Context, spec: ExportSpec) -> dict[str, Any]:
    """Exports a fine-tuned model as GGUF files, and registers them as a version."""
    job_row = outputs.own_job(context.job_id)
    if not get_settings().mlflow.enabled:
        raise RegistryDisabled()
    if not job_row.tracked:
        raise ExportNotTracked()
    training = outputs.get_output(spec.job_id, "fine_tune", context.owner_id)
    threads = max(1, int(job_row.resources["cpus"]))
    name = spec.name or training.result["name"]
    owner = names.require_name(context, name)
    with workspace.temporary_folder(context.job_id) as folder:
        files, adapter = build_files(context, spec, training, name, threads, folder)
        context.report(progress=80, phase="waiting for MLflow")
        run_id = _run_id(context)

        def on_progress(done: int, total: int) -> None:
            context.report(progress=80 + 20 * done / max(1, total), phase="registering")

        version = asyncio.run(_register(name, run_id, files, adapter, training, context.job_id, owner, on_progress))
    context.log(f"Registered as {version.reference}.")
    return {
        "name": version.name,
        "version": version.number,
        # As registered: by this attempt, or by an earlier one that ended before it could return.
        "files": [_file_result(file, seconds) for file, (_, _, seconds) in zip(version.files, files, strict=True)],
        "adapter": _without_quantization(version.adapter) if version.adapter else None,
        "run_id": version.run_id,
    }


ExportedFile = tuple[ModelFile, Path, float]
"""A file, its path, and the seconds that it took."""


def build_files(
    context: Context, spec: ExportSpec, training: JobOutput, name: str, threads: int, folder: Path
) -> tuple[list[ExportedFile], tuple[ModelFile, Path] | None]:
    """Convert, quantize and verify a model's files in `folder`, without registering them."""
    context.report(progress=0, phase="fetching the model")
    model = base_models.fetch(training.result["model"], folder, training.job_id)
    needs_merge = base_models.is_adapter(model)
    if spec.adapter and not needs_merge:
        raise NoAdapter(f"{training.job_id} has trained the whole model, so there is no adapter to export.")
    base = base_models.resolve(training.result["base_model"], context.owner_id) if needs_merge else None
    scripts = llama_converter.locate_converter()

    quantizations = list(dict.fromkeys(spec.quantizations))
    needed_bytes = _required_bytes(Path(base) if base else model, quantizations, needs_merge)
    purpose = f"An export of {name} as {', '.join(quantizations)}"
    disk.require_space(folder, needed_bytes, purpose)
    try:
        return _build_files(context, quantizations, spec.adapter, name, threads, folder, model, base, scripts)
    except (ForgearrError, OSError) as error:
        if workspace.is_disk_full(error, folder):
            raise workspace.disk_full_error(folder, needed_bytes, purpose) from error
        raise


def _build_files(
    context: Context,
    quantizations: Sequence[Quantization],
    with_adapter: bool,
    name: str,
    threads: int,
    folder: Path,
    model: Path,
    base: str | None,
    scripts: Path,
) -> tuple[list[ExportedFile], tuple[ModelFile, Path] | None]:
    paths = {quantization: folder / f"{name}-{quantization}.gguf" for quantization in quantizations}
    adapter_path = folder / f"{name}-lora-f16.gguf" if with_adapter else None
    direct = quantizations[0] if len(quantizations) == 1 and quantizations[0] in CONVERTER_QUANTIZATIONS else None
    converted = paths[direct] if direct else folder / "converted.gguf"

    started = time.monotonic()
    arguments = {
        "model": str(model),
        "base": base,
        "file": str(converted),
        "outtype": direct or "auto",
        "adapter_file": str(adapter_path) if adapter_path else None,
        "work": str(folder),
    }
    conversion_result = _run_step(context, convert.convert, arguments, (0, 40), threads, scripts)
    if not direct and conversion_result["outtype"] in quantizations:
        converted = converted.rename(paths[conversion_result["outtype"]])
    conversion_seconds = time.monotonic() - started

    arguments = {
        "source": str(converted),
        "files": [{"path": str(path), "quantization": quantization} for quantization, path in paths.items()],
        "adapter": str(adapter_path) if adapter_path else None,
        "threads": threads,
    }
    file_results = _run_step(context, quantize.finish, arguments, (40, 75), threads, None)
    exported: list[ExportedFile] = []
    for (quantization, path), file_result in zip(paths.items(), file_results[: len(paths)], strict=True):
        if file_result["fallbacks"]:
            context.log(
                f"{quantization}: {file_result['fallbacks']} tensors have rows that are not divisible by its block "
                "size, and are stored in a larger type.",
                "WARNING",
            )
        seconds = file_result["seconds"] + (conversion_seconds if path == converted else 0)
        exported.append((_describe_file(path, quantization, file_result), path, round(seconds, 3)))
    return exported, (_describe_file(adapter_path, "lora", file_results[-1]), adapter_path) if adapter_path else None


def _run_step(
    context: Context,
    function: Callable[..., Any],
    arguments: dict[str, Any],
    progress: tuple[float, float],
    threads: int,
    scripts: Path | None,
) -> Any:
    """Run one step. It is killed when the job should stop, and started again if the job continues after all."""
    first, last = progress

    def report(fraction: float, phase: str) -> None:
        context.report(progress=first + (last - first) * fraction, phase=phase)

    paths = (scripts / "gguf-py", scripts) if scripts else ()
    while True:
        try:
            return isolated.run_isolated(
                function,
                arguments,
                report=report,
                should_stop=context.should_stop,
                threads=threads,
                paths=paths,
            )
        except isolated.StepInterrupted:
            context.checkpoint(context.checkpoint_state)


def _required_bytes(model: Path, quantizations: Sequence[Quantization], needs_merge: bool) -> int:
    """The peak disk space of an export in bytes, computed from the headers of the model's files."""
    weights, size = _count_weights(model)
    converted = weights * 2
    peak_converting = (max(size, converted) if needs_merge else 0) + converted  # a base in 4 bits is dequantized
    peak_quantizing = sum(weights * BITS_PER_WEIGHT[quantization] / 8 for quantization in quantizations)
    if len(quantizations) > 1 or quantizations[0] not in CONVERTER_QUANTIZATIONS:
        peak_quantizing += converted
    return int(max(peak_converting, peak_quantizing) * 1.02) + 20_000_000  # vocabularies, headers


def _count_weights(model: Path) -> tuple[int, int]:
    """The number of a model's weights, and their size in bytes."""
    weights = size = 0
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
        for tensor, info in header.items():
            if tensor == "__metadata__":
                continue
            count = 2 if info["dtype"] == "U8" else 1  # a byte holds two weights of 4 bits
            for dimension in info["shape"]:
                count *= dimension
            weights += count
            size += info["data_offsets"][1] - info["data_offsets"][0]
    return weights, size


def _describe_file(path: Path, quantization: str, file_result: Mapping[str, Any]) -> ModelFile:
    return ModelFile(path.name, quantization, file_result["sha256"], path.stat().st_size)


def _run_id(context: Context) -> str:
    """The job's MLflow run, which jobs/mlflow_sync.py creates after the job has started."""
    deadline = time.monotonic() + RUN_TIMEOUT_SECONDS
    while (run_id := outputs.own_job(context.job_id).mlflow_run_id) is None:
        if time.monotonic() > deadline:
            raise RunMissing(
                f"The run of {context.job_id} has not appeared in MLflow within {RUN_TIMEOUT_SECONDS} s, so its files "
                "cannot be registered. Check with `forgearr status` whether MLflow runs, and with `forgearr logs "
                "--component dispatcher` what it has refused."
            )
        context.sleep(0.25)
    return run_id


async def _register(
    name: str,
    run_id: str,
    files: Sequence[ExportedFile],
    adapter: tuple[ModelFile, Path] | None,
    training: JobOutput,
    job_id: str,
    owner: Principal,
    on_progress: Callable[[int, int], None],
) -> Version:
    owner_id = await asyncio.to_thread(
        run_with_database, lambda database: owner_of_version(database, training.owner_id)
    )
    async with registry.connect() as models:
        version = await models.register(
            name,
            run_id,
            [(file, path) for file, path, _ in files],
            adapter,
            base_model=training.result["base_model"],
            job_id=training.job_id,
            export_job_id=job_id,
            principal=owner,
            owner_id=owner_id,
            on_progress=on_progress,
        )
    for file, path, _ in files[:1]:  # the served file is likely to be needed on this machine next
        model_cache.cache_file(path, file.sha256)
    return version


async def owner_of_version(database: Database, trainer_id: str | None) -> str | None:
    """The owner of a model that this account has trained. What administrators train belongs to nobody."""
    if trainer_id is None:
        return None
    async with database.read_transaction() as session:
        trainer = await session.get(User, trainer_id)
    return None if trainer is not None and trainer.role == "admin" else trainer_id


def _file_result(file: ModelFile, seconds: float) -> dict[str, Any]:
    return {"quantization": file.quantization, **_without_quantization(file), "seconds": seconds}


def _without_quantization(file: ModelFile) -> dict[str, Any]:
    return {"name": file.name, "sha256": file.sha256, "bytes": file.bytes}
