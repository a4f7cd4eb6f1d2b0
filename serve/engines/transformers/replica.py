"""The deployment of Ray Serve that runs models and adapters without GGUF files, in the format of transformers.

It has no replica before the first request, because torch alone takes half a gigabyte.
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
from serve.engines.local.engine import LocalEngine, report_models_to_router
from serve.engines.local.pool import MB, LoadPlan, Purpose
from serve.engines.model_header import Header
from serve.engines.protocol import EngineUnavailable, ModelFolder, Source
from serve.engines.transformers.memory import TransformersFiles, adapter_bytes, read_folder

if TYPE_CHECKING:
    from serve.engines.transformers.model import TransformersModel


class TransformersReplica(LocalEngine["TransformersModel"]):
    """The engine in a replica: it reports its loaded models to Serve's router."""

    def __init__(self) -> None:
        logs.configure("transformers")
        settings = get_settings().engines
        super().__init__(settings, TransformersLoader(settings), on_change=report_models_to_router)


class TransformersLoader:
    """Satisfies local.Loader."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings

    async def prepare(
        self, reference: str, source: Source, purpose: Purpose, on_progress: OnProgress
    ) -> "LoadPlan[TransformersModel]":
        return await asyncio.to_thread(self._prepare, reference, source, purpose)

    async def describe(self, reference: str, source: Source) -> Header:
        return await asyncio.to_thread(self._describe, reference, source)

    def _prepare(self, reference: str, source: Source, purpose: Purpose) -> "LoadPlan[TransformersModel]":
        _require_packages(self._settings)
        from serve.engines.transformers.loading import compute_dtype
        from serve.engines.transformers.model import TransformersModel

        files = _fetch(reference, source)
        folder = read_folder(files.model, reference)
        element_size, slots = compute_dtype(self._settings).itemsize, self._settings.slots
        context = min(self._settings.context, folder.header.context)
        # A model that is quantized already is not quantized again.
        in_4bit = self._settings.load_in_4bit and not folder.is_quantized
        settings = self._settings.model_copy(update={"load_in_4bit": in_4bit})
        weights = folder.weight_bytes(element_size, in_4bit)
        weights += adapter_bytes(files.adapter) if files.adapter else 0
        working_bytes = folder.working_bytes(context, slots, element_size) if purpose == "answers" else 0
        return LoadPlan(
            bytes=weights + working_bytes,
            breakdown=f"{weights // MB} MB of weights, and {slots} slots of {context} tokens",
            remedy="set engines.load_in_4bit, or export the model as GGUF",
            context=context,
            load=partial(TransformersModel, files, context, settings, purpose),
        )

    def _describe(self, reference: str, source: Source) -> Header:
        files = _fetch(reference, source)
        return read_folder(files.model, reference).header


def _fetch(reference: str, source: Source) -> TransformersFiles:
    """Fetch the model to this machine. Temporary copies are deleted together with the returned object."""
    assert isinstance(source, ModelFolder)
    if source.address is None:
        return TransformersFiles(Path(base_models.resolve(source.base_model)), None)
    work = tempfile.mkdtemp(prefix="forgearr-")
    try:
        downloaded = base_models.fetch(source.address, Path(work), reference)
        is_adapter = base_models.is_adapter(downloaded)
        files = (
            TransformersFiles(Path(base_models.resolve(source.base_model)), downloaded)
            if is_adapter
            else TransformersFiles(downloaded, None)
        )
    except BaseException:
        shutil.rmtree(work)
        raise
    finalize(files, shutil.rmtree, work, ignore_errors=True)
    return files


def _require_packages(settings: EngineSettings) -> None:
    required = ["torch", "transformers", "peft", *(["bitsandbytes"] if settings.load_in_4bit else [])]
    missing = [name for name in required if find_spec(name) is None]
    if missing:
        raise EngineUnavailable(
            f"Models without GGUF files need {' and '.join(missing)}, which is not installed. Run `pip install "
            f"{' '.join(missing)}`, and restart Forgearr."
        )
