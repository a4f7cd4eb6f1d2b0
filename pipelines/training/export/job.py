"""The kind `export`: what a fine-tune has made, as GGUF files that llama.cpp runs, registered as a version.

The job's own process only conducts: torch and llama.cpp work in processes of their own (steps.py). The model is
converted once. When one 16-bit or q8_0 file is all that is wanted, the converter writes it; else it writes 16 bits, and
llama.cpp makes the others from them.
"""

import asyncio
import json
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.errors import ForgearrError, Unavailable, UnprocessableRequest
from cluster.settings import get_settings
from jobs import outputs
from jobs.context import Context
from jobs.execution import isolated, workspace
from jobs.outputs import Made
from jobs.registry import Resources, job
from pipelines.training.export import llama_converter
from pipelines.training.models import base_models, registry
from pipelines.training.models.versions import File, RegistryOff, Version
from pipelines.training.spec import ExportSpec, Quantization

BITS: dict[Quantization, float] = {
    "f16": 16,
    "bf16": 16,
    "q8_0": 8.6,
    "q6_k": 6.9,
    "q5_k_m": 6.2,
    "q4_k_m": 5.6,
    "q4_0": 5.3,
}
"""How much a weight takes at most, to know beforehand whether a file fits on the disk."""
WRITTEN_BY_CONVERTER = {"f16", "bf16", "q8_0"}
RUN_SECONDS = 120
"""How long to wait for the job's run in MLflow, which appears some seconds after the job has started."""


class NoAdapter(UnprocessableRequest):
    """The model was trained in full, so there is no adapter to export."""

    code = "NO_ADAPTER"


class NotTracked(UnprocessableRequest):
    """An export belongs to a run in MLflow, which holds its files: submit it as a tracked job."""

    code = "EXPORT_NOT_TRACKED"


class RunMissing(Unavailable):
    """The job's run has not appeared in MLflow."""

    code = "MLFLOW_RUN_MISSING"


@job("export", spec=ExportSpec, resources=Resources(cpus=1), tracked=True)
def export(context: Context, spec: ExportSpec) -> dict[str, Any]:
    """Turns what a fine-tune has made into GGUF files, and registers them as a version."""
    own = outputs.own_row(context.job_id)
    if not get_settings().mlflow.enabled:
        raise RegistryOff()
    if not own.tracked:
        raise NotTracked()
    made = outputs.of(spec.job_id, "fine_tune", context.owner_id)
    threads = max(1, int(own.resources["cpus"]))
    name = spec.name or made.result["name"]
    with workspace.folder(context.job_id) as place:
        files, adapter = make_files(context, spec, made, name, threads, place)
        context.report(progress=80, phase="waiting for MLflow")
        run_id = _run_id(context)

        def on_progress(done: int, total: int) -> None:
            context.report(progress=80 + 20 * done / max(1, total), phase="registering")

        version = asyncio.run(_register(name, run_id, files, adapter, made, context.job_id, on_progress))
    context.log(f"Registered as {version.reference}.")
    return {
        "name": version.name,
        "version": version.number,
        # As registered: by this attempt, or by one before it that could not tell any more.
        "files": [_told(file, seconds) for file, (_, _, seconds) in zip(version.files, files, strict=True)],
        "adapter": _without_quantization(version.adapter) if version.adapter else None,
        "run_id": version.run_id,
    }


Exported = tuple[File, Path, float]
"""A file, where it is, and how many seconds it took."""


def make_files(
    context: Context, spec: ExportSpec, made: Made, name: str, threads: int, place: Path
) -> tuple[list[Exported], tuple[File, Path] | None]:
    """Convert, quantize and prove, within `place`. Registers nothing."""
    context.report(progress=0, phase="fetching the model")
    model = base_models.fetch(made.result["model"], place, made.job_id)
    merges = base_models.is_adapter(model)
    if spec.adapter and not merges:
        raise NoAdapter(f"{made.job_id} has trained the whole model, so there is no adapter to export.")
    base = base_models.folder(made.result["base_model"]) if merges else None
    scripts = llama_converter.folder()

    wanted = list(dict.fromkeys(spec.quantizations))
    needed = _space(Path(base) if base else model, wanted, merges)
    purpose = f"An export of {name} as {', '.join(wanted)}"
    workspace.require_space(place, needed, purpose)
    try:
        return _make_files(context, wanted, spec.adapter, name, threads, place, model, base, scripts)
    except (ForgearrError, OSError) as error:
        if workspace.is_full(error, place):
            raise workspace.filled(place, needed, purpose) from error
        raise


def _make_files(
    context: Context,
    wanted: Sequence[Quantization],
    with_adapter: bool,
    name: str,
    threads: int,
    place: Path,
    model: Path,
    base: str | None,
    scripts: Path,
) -> tuple[list[Exported], tuple[File, Path] | None]:
    paths = {quantization: place / f"{name}-{quantization}.gguf" for quantization in wanted}
    adapter_path = place / f"{name}-lora-f16.gguf" if with_adapter else None
    direct = wanted[0] if len(wanted) == 1 and wanted[0] in WRITTEN_BY_CONVERTER else None
    converted = paths[direct] if direct else place / "converted.gguf"

    started = time.monotonic()
    request = {
        "model": str(model),
        "base": base,
        "file": str(converted),
        "outtype": direct or "auto",
        "adapter_file": str(adapter_path) if adapter_path else None,
        "work": str(place),
    }
    told = _step(context, "pipelines.training.export.convert:convert", request, (0, 40), threads, scripts)
    if not direct and told["outtype"] in wanted:
        converted = converted.rename(paths[told["outtype"]])
    conversion = time.monotonic() - started

    request = {
        "source": str(converted),
        "files": [{"path": str(path), "quantization": quantization} for quantization, path in paths.items()],
        "adapter": str(adapter_path) if adapter_path else None,
        "threads": threads,
    }
    proofs = _step(context, "pipelines.training.export.quantize:finish", request, (40, 75), threads, None)
    exported: list[Exported] = []
    for (quantization, path), proof in zip(paths.items(), proofs[: len(paths)], strict=True):
        if proof["fallbacks"]:
            context.log(
                f"{quantization}: {proof['fallbacks']} tensors have rows that its blocks do not divide, and are kept "
                "in a larger type.",
                "WARNING",
            )
        seconds = proof["seconds"] + (conversion if path == converted else 0)
        exported.append((_file(path, quantization, proof), path, round(seconds, 3)))
    return exported, (_file(adapter_path, "lora", proofs[-1]), adapter_path) if adapter_path else None


def _step(
    context: Context,
    function: str,
    request: dict[str, Any],
    progress: tuple[float, float],
    threads: int,
    scripts: Path | None,
) -> Any:
    """Run one step. It is killed when the job should stop, and begun anew when the job goes on after all."""
    first, last = progress

    def report(part: float, doing: str) -> None:
        context.report(progress=first + (last - first) * part, phase=doing)

    paths = (scripts / "gguf-py", scripts) if scripts else ()
    while True:
        try:
            return isolated.run(
                function,
                request,
                report=report,
                should_stop=context.should_stop,
                threads=threads,
                paths=paths,
            )
        except isolated.Interrupted:
            context.checkpoint(context.checkpoint_state)


def _space(model: Path, wanted: Sequence[Quantization], merges: bool) -> int:
    """The bytes that an export needs at its fullest, from the sizes that the model's files declare."""
    weights, size = _weigh(model)
    converted = weights * 2
    before = (max(size, converted) if merges else 0) + converted  # a base in 4 bits is unpacked
    after = sum(weights * BITS[quantization] / 8 for quantization in wanted)
    if len(wanted) > 1 or wanted[0] not in WRITTEN_BY_CONVERTER:
        after += converted
    return int(max(before, after) * 1.02) + 20_000_000  # vocabularies, headers


def _weigh(model: Path) -> tuple[int, int]:
    """How many weights a model has, and their bytes."""
    weights = size = 0
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
        for tensor, described in header.items():
            if tensor == "__metadata__":
                continue
            count = 2 if described["dtype"] == "U8" else 1  # 4 bits each
            for dimension in described["shape"]:
                count *= dimension
            weights += count
            size += described["data_offsets"][1] - described["data_offsets"][0]
    return weights, size


def _file(path: Path, quantization: str, proof: Mapping[str, Any]) -> File:
    return File(path.name, quantization, proof["sha256"], path.stat().st_size)


def _run_id(context: Context) -> str:
    """The job's run in MLflow, which the tracker makes when it hears of the job."""
    deadline = time.monotonic() + RUN_SECONDS
    while (run_id := outputs.own_row(context.job_id).mlflow_run_id) is None:
        if time.monotonic() > deadline:
            raise RunMissing(
                f"The run of {context.job_id} has not appeared in MLflow within {RUN_SECONDS} s, so its files cannot "
                "be registered. See in `forgearr status` whether MLflow runs."
            )
        context.sleep(0.25)
    return run_id


async def _register(
    name: str,
    run_id: str,
    files: Sequence[Exported],
    adapter: tuple[File, Path] | None,
    made: Made,
    job_id: str,
    on_progress: Callable[[int, int], None],
) -> Version:
    async with registry.connect() as models:
        version = await models.register(
            name,
            run_id,
            [(file, path) for file, path, _ in files],
            adapter,
            base_model=made.result["base_model"],
            job_id=made.job_id,
            export_job_id=job_id,
            on_progress=on_progress,
        )
    for file, path, _ in files[:1]:  # the one that is served is likely to be wanted here next
        registry.keep(path, file.sha256)
    return version


def _told(file: File, seconds: float) -> dict[str, Any]:
    return {"quantization": file.quantization, **_without_quantization(file), "seconds": seconds}


def _without_quantization(file: File) -> dict[str, Any]:
    return {"name": file.name, "sha256": file.sha256, "bytes": file.bytes}
