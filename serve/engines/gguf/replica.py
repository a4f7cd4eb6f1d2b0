"""The deployment of Ray Serve that runs GGUF files. Each replica has its own pool of models.

A request also names its model to Serve's router, which prefers a replica that has the model in memory.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

from cluster import logs
from cluster.errors import Unavailable
from cluster.settings import EngineSettings, get_settings
from pipelines.training.models import registry, tiny
from pipelines.training.models.chat_template import check_chat_template
from pipelines.training.models.registry import OnProgress
from pipelines.training.models.versions import ModelDefaults, Version
from serve.engines.defaults import context_limit
from serve.engines.gguf import tiny as gguf_tiny
from serve.engines.gguf.model import GgufModelFiles, LlamaCppModel
from serve.engines.local.engine import LocalEngine, report_models_to_router
from serve.engines.local.pool import MB, LoadPlan, Purpose
from serve.engines.model_header import BATCH_TOKENS, Header, read_header
from serve.engines.protocol import RequestRefused, Source

log = logging.getLogger(__name__)

MAX_PRELOADED_ADAPTERS = 32
"""The newest adapters of a model are loaded with it, before the first request for them."""

FindFile = Callable[[str, Source, OnProgress], Awaitable[Path]]
"""Returns the path of a model's file on this machine, and downloads it if necessary."""
FindAdapters = Callable[[str, Version | None], Awaitable[Mapping[str, Path]]]
"""Returns the files of a base model's adapters by reference, including the given adapter."""


class GgufEngine(LocalEngine[LlamaCppModel]):
    def __init__(
        self,
        settings: EngineSettings,
        find_file: FindFile | None = None,
        find_adapters: FindAdapters | None = None,
        on_change: Callable[[list[str]], None] = lambda _: None,
    ) -> None:
        super().__init__(settings, GgufLoader(settings, find_file, find_adapters), on_change)

    async def load(self, reference: str, source: Source = None) -> str:
        if source is None and reference != tiny.NAME:
            source = await _find(reference)
            reference = source.reference
        return await super().load(reference, source)

    async def set_keep_alive(self, reference: str, seconds: float | None, source: Source = None) -> None:
        await super().set_keep_alive(_base_model_of(reference, source)[0], seconds)

    def _use(
        self, reference: str, source: Source, purpose: Purpose = "answers", account: str = ""
    ) -> AbstractAsyncContextManager[LlamaCppModel]:
        adapter = _as_adapter(source)
        if adapter is None:
            return super()._use(reference, source, purpose, account)
        if purpose == "embeddings":
            raise RequestRefused(f"{reference} is an adapter. Adapters create no embeddings; try {adapter.base_model}.")
        prepare = partial(self._loader.prepare, reference, source, purpose)

        def has_adapter(model: LlamaCppModel) -> bool:
            return reference in model.adapters

        return self._pool.use(adapter.base_model, prepare, purpose, has_adapter, account)


class GgufLoader:
    """Satisfies local.Loader."""

    def __init__(
        self, settings: EngineSettings, find_file: FindFile | None = None, find_adapters: FindAdapters | None = None
    ) -> None:
        self._settings = settings
        self._find_file = find_file or _find_file
        self._find_adapters = find_adapters or _find_adapters
        # A caller that provides the files may have no registry.
        self._find_version = _find_base if find_file is None else _no_version

    async def prepare(
        self, reference: str, source: Source, purpose: Purpose, on_progress: OnProgress
    ) -> LoadPlan[LlamaCppModel]:
        files = await self._resolve_files(reference, source, purpose, on_progress)
        header = await asyncio.to_thread(read_header, files.model)
        for template in (files.template or header.template, header.tool_template):
            await asyncio.to_thread(check_chat_template, template, reference)
        slots, context = self._settings.slots, min(files.context or self._settings.context, header.context)
        batch = context if purpose == "embeddings" else BATCH_TOKENS
        return LoadPlan(
            bytes=header.memory_bytes(context, slots, batch) + files.adapter_bytes,
            breakdown=f"{header.file_bytes // MB} MB of weights, and {slots} slots of {context} tokens",
            remedy="export the model with fewer bits",
            context=context,
            load=partial(LlamaCppModel, files, header, context, self._settings, purpose),
        )

    async def describe(self, reference: str, source: Source) -> Header:
        path = await self._find_file(*_base_model_of(reference, source), lambda done, total: None)
        return await asyncio.to_thread(read_header, path)

    async def _resolve_files(
        self, reference: str, source: Source, purpose: Purpose, on_progress: OnProgress
    ) -> GgufModelFiles:
        base, base_source = _base_model_of(reference, source)
        adapter = _as_adapter(source)
        version = await self._find_version(base) if adapter else base_source
        path = await self._find_file(base, version, on_progress)
        adapters = await self._find_adapters(base, adapter) if purpose == "answers" else {}
        defaults = version.defaults if isinstance(version, Version) else ModelDefaults()
        return GgufModelFiles(path, adapters, defaults.template, context_limit(defaults))


class GgufReplica(GgufEngine):
    """The engine in a replica: it reports its loaded models to Serve's router."""

    def __init__(self) -> None:
        logs.configure("gguf")
        super().__init__(get_settings().engines, on_change=report_models_to_router)


async def _find_file(reference: str, source: Source, on_progress: OnProgress) -> Path:
    if reference == tiny.NAME:
        return await gguf_tiny.ensure_file()
    async with registry.connect() as models:
        version = source if isinstance(source, Version) else await models.find(reference)
        return await models.fetch(version, on_progress=on_progress)


async def _find_adapters(base: str, requested: Version | None) -> Mapping[str, Path]:
    if not get_settings().mlflow.enabled:
        return {}
    async with registry.connect() as models:
        try:
            adapters = await models.adapters_of(base)
        except Unavailable as error:
            log.warning("The adapters of %s will be loaded with the first request for them: %s", base, error.message)
            adapters = []
        known = {
            adapter.reference: adapter
            for adapter in [*adapters[:MAX_PRELOADED_ADAPTERS], *([requested] if requested else [])]
        }
        return {reference: await models.fetch(adapter) for reference, adapter in known.items()}


def _base_model_of(reference: str, source: Source) -> tuple[str, Source]:
    """The model that must be in memory: the base model of an adapter, or the model itself."""
    adapter = _as_adapter(source)
    return (adapter.base_model, None) if adapter else (reference, source)


def _as_adapter(source: Source) -> Version | None:
    return source if isinstance(source, Version) and source.is_adapter else None


async def _find_base(reference: str) -> Version | None:
    return None if reference == tiny.NAME else await _find(reference)


async def _no_version(reference: str) -> None:
    return None


async def _find(reference: str) -> Version:
    async with registry.connect() as models:
        return await models.find(reference)
