"""forgearr/tiny as GGUF, before any training: made once on each machine, in a process of its own that loads torch."""

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import Any

from cluster.settings import home
from jobs.execution import isolated
from jobs.execution.isolated import OnProgress
from pipelines.training.export import llama_converter
from pipelines.training.models import tiny

QUANTIZATION = "q8_0"


async def ensure_file() -> Path:
    """The file, made when it is not there yet."""
    return await asyncio.to_thread(_ensure_file)


def make(file: str, work: str, report: OnProgress) -> dict[str, Any]:
    """The step: build the model and convert it."""
    from pipelines.training.export import convert

    model = str(tiny.model_folder())
    return convert.convert(model, None, file, QUANTIZATION, None, work, report)


def _ensure_file() -> Path:
    target = home() / "cache" / f"{tiny.folder_name()}-{QUANTIZATION}.gguf"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scripts = llama_converter.locate_converter()
    work = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        converted = work / target.name
        isolated.run_isolated(
            f"{__name__}:make",
            {"file": str(converted), "work": str(work)},
            report=lambda part, doing: None,
            should_stop=lambda: False,
            threads=1,
            paths=(scripts / "gguf-py", scripts),
        )
        converted.replace(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target
