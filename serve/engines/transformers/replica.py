"""The engine for folders of transformers': models and adapters that have no GGUF yet.

It is a deployment of Ray Serve that has no replica until somebody asks: torch alone takes half a gigabyte.
"""

import asyncio
import shutil
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import finalize

from cluster import logs
from cluster.settings import EngineSettings, get_settings
from pipelines.training.models import base_models
from pipelines.training.models.registry import OnProgress
from serve.engines.local.engine import LocalEngine, tell_router
from serve.engines.local.pool import MB, Plan, Purpose
from serve.engines.model_header import Header
from serve.engines.protocol import EngineUnavailable, Folder, Source
from serve.engines.transformers.memory import Files, adapter_bytes, read_folder

if TYPE_CHECKING:
    from serve.engines.transformers.model import LoadedFolder


class TransformersReplica(LocalEngine["LoadedFolder"]):
    """The engine in a replica of its own, which tells Serve's router what it holds."""

    def __init__(self) -> None:
        logs.configure("transformers")
        settings = get_settings().engines
        super().__init__(settings, Folders(settings), on_change=tell_router)


class Folders:
    """Satisfies local.Loader."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings

    async def prepare(self, reference: str, source: Source, purpose: Purpose, tell: OnProgress) -> "Plan[LoadedFolder]":
        return await asyncio.to_thread(self._prepare, reference, source, purpose)

    async def describe(self, reference: str, source: Source) -> Header:
        return await asyncio.to_thread(self._describe, reference, source)

    def _prepare(self, reference: str, source: Source, purpose: Purpose) -> "Plan[LoadedFolder]":
        _require_what_is_needed(self._settings)
        from serve.engines.transformers.loading import element
        from serve.engines.transformers.model import LoadedFolder

        files = _fetch(reference, source)
        found = read_folder(files.model, reference)
        size, slots = element(self._settings).itemsize, self._settings.slots
        context = min(self._settings.context, found.header.context)
        # What is packed already stays as it is.
        in_4bit = self._settings.load_in_4bit and not found.is_quantized
        settings = self._settings.model_copy(update={"load_in_4bit": in_4bit})
        weights = found.weight_bytes(size, in_4bit)
        weights += adapter_bytes(files.adapter) if files.adapter else 0
        working = found.working_bytes(context, slots, size) if purpose == "answers" else 0
        return Plan(
            bytes=weights + working,
            parts=f"{weights // MB} MB of weights, and {slots} slots of {context} tokens",
            remedy="set engines.load_in_4bit, or export the model as GGUF",
            context=context,
            load=partial(LoadedFolder, files, context, settings, purpose),
        )

    def _describe(self, reference: str, source: Source) -> Header:
        files = _fetch(reference, source)
        return read_folder(files.model, reference).header


def _fetch(reference: str, source: Source) -> Files:
    """The model on this machine. Copies that were made for that are there as long as somebody holds this."""
    assert isinstance(source, Folder)
    if source.address is None:
        return Files(Path(base_models.folder(source.base_model)), None)
    work = tempfile.mkdtemp(prefix="forgearr-")
    try:
        made = base_models.fetch(source.address, Path(work), reference)
        is_adapter = base_models.is_adapter(made)
        files = Files(Path(base_models.folder(source.base_model)), made) if is_adapter else Files(made, None)
    except BaseException:
        shutil.rmtree(work)
        raise
    finalize(files, shutil.rmtree, work, ignore_errors=True)
    return files


def _require_what_is_needed(settings: EngineSettings) -> None:
    wanted = ["torch", "transformers", "peft", *(["bitsandbytes"] if settings.load_in_4bit else [])]
    missing = [name for name in wanted if find_spec(name) is None]
    if missing:
        raise EngineUnavailable(
            f"Models that are no GGUF need {' and '.join(missing)}, which is not installed here: `pip install "
            f"{' '.join(missing)}`, and start Forgearr again."
        )
