"""Creates the GGUF file of forgearr/tiny before any training, once on each machine.

The conversion loads torch, so it has a process of its own.
"""

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import Any

from cluster import durable
from cluster.settings import home
from jobs.execution import isolated
from jobs.execution.isolated import OnProgress
from pipelines.training.export import convert, llama_converter
from pipelines.training.models import tiny

QUANTIZATION = "q8_0"


async def ensure_file() -> Path:
    """The path of the file, which is created if it does not exist."""
    return await asyncio.to_thread(_ensure_file)


def make(model: str, file: str, work: str, report: OnProgress) -> dict[str, Any]:
    """Build the model and convert it. Runs in the separate process."""
    tiny.ensure(Path(model))
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
            make,
            {"model": str(target.parent / tiny.folder_name()), "file": str(converted), "work": str(work)},
            report=lambda progress, message: None,
            should_stop=lambda: False,
            threads=1,
            paths=(scripts / "gguf-py", scripts),
        )
        durable.publish(converted, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target
