"""The engine for GGUF files: a deployment of Ray Serve, of which each replica holds models of its own.

A request names its model to Serve's router too, which sends it to a replica that has that model in memory.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil

from cluster import logs
from cluster.errors import Unavailable
from cluster.settings import EngineSettings, get_settings
from pipelines.training import registry, tiny
from pipelines.training.registry import Manner, Version
from serve.engines import untrained
from serve.engines.answers import Answer
from serve.engines.header import Header, read_header
from serve.engines.llama import Files, LoadedModel, Purpose
from serve.engines.protocol import Chunk, Embedded, Held, Request, RequestRefused, Source
from serve.engines.shelf import MB, Shelf
from serve.manner import applied, context_of

log = logging.getLogger(__name__)

MOST_ADAPTERS = 32
"""To load with a model before anybody asks for them: the newest."""

FindFile = Callable[[str, Source], Awaitable[Path]]
"""Where the file of a model is, on this machine, when it is not in memory."""
FindAdapters = Callable[[str, Version | None], Awaitable[Mapping[str, Path]]]
"""The files of the adapters that stand on a model, by reference; this one among them, if it is one."""


class GgufEngine:
    """Satisfies protocol.Engine."""

    def __init__(
        self,
        settings: EngineSettings,
        find_file: FindFile | None = None,
        find_adapters: FindAdapters | None = None,
        on_change: Callable[[list[str]], None] = lambda _: None,
    ) -> None:
        self._find_file = find_file or _find_file
        self._find_adapters = find_adapters or _find_adapters
        # Whoever brings the files himself may have no registry.
        self._find_version = _find_base if find_file is None else _find_nothing
        capacity = settings.memory_mb * MB if settings.memory_mb else psutil.virtual_memory().total // 2
        self._shelf = Shelf(capacity, settings, on_change)

    async def chat(self, reference: str, request: Request, source: Source = None) -> AsyncGenerator[list[Chunk]]:
        asked = perf_counter()
        if isinstance(source, Version):
            request = applied(request, source.manner)
        async with self._use(reference, source) as model:
            load_ms = (perf_counter() - asked) * 1000
            async with aclosing(model.answer(request, reference if _adapter(source) else None)) as answer:
                async for chunks in answer:
                    if timings := chunks[-1].get("timings"):
                        timings["load_ms"] = load_ms
                    yield chunks

    async def complete(self, reference: str, request: Request, source: Source = None) -> dict[str, Any]:
        answer = Answer()
        async with aclosing(self.chat(reference, request, source)) as spoken:
            async for chunks in spoken:
                for chunk in chunks:
                    answer.hear(chunk)
        return answer.whole()

    async def embed(self, reference: str, texts: Sequence[str], source: Source = None) -> Embedded:
        if adapter := _adapter(source):
            raise RequestRefused(f"{reference} is an adapter, which makes no embeddings; {adapter.base_model} may.")
        async with self._use(reference, source, "embeddings") as model:
            return await model.embed(texts)

    async def describe(self, reference: str, source: Source = None) -> Header:
        return await asyncio.to_thread(read_header, await self._find_file(*_base(reference, source)))

    async def load(self, reference: str, source: Source = None) -> str:
        if source is None and reference != tiny.NAME:
            source = await _find(reference)
            reference = source.reference
        async with self._use(reference, source):
            return reference

    async def unload(self, reference: str, source: Source = None) -> bool:
        return await self._shelf.unload(reference)

    async def loaded(self) -> list[Held]:
        return self.held

    @property
    def held(self) -> list[Held]:
        return [Held(entry.reference, entry.bytes, entry.context, entry.users) for entry in self._shelf.loaded()]

    def _use(
        self, reference: str, source: Source, purpose: Purpose = "answers"
    ) -> AbstractAsyncContextManager[LoadedModel]:
        base, own = _base(reference, source)
        adapter = _adapter(source)

        async def obtain() -> Files:
            version = await self._find_version(base) if adapter else own
            path = await self._find_file(base, version)
            adapters = await self._find_adapters(base, adapter) if purpose == "answers" else {}
            manner = version.manner if isinstance(version, Version) else Manner()
            return Files(path, adapters, manner.template, context_of(manner))

        return self._shelf.use(base, obtain, purpose, reference if adapter else None)


class GgufReplica(GgufEngine):
    """The engine in a replica of its own, which tells Serve's router what it holds."""

    def __init__(self) -> None:
        logs.configure("gguf")
        super().__init__(get_settings().engines, on_change=_tell_router)


async def _find_file(reference: str, source: Source) -> Path:
    if reference == tiny.NAME:
        return await untrained.file()
    async with registry.connect() as models:
        return await models.fetch(source if isinstance(source, Version) else await models.find(reference))


async def _find_adapters(base: str, wanted: Version | None) -> Mapping[str, Path]:
    if not get_settings().mlflow.enabled:
        return {}
    async with registry.connect() as models:
        try:
            adapters = await models.adapters_of(base)
        except Unavailable as error:
            log.warning("Adapters of %s are loaded when somebody asks for them: %s", base, error.message)
            adapters = []
        known = {adapter.reference: adapter for adapter in [*adapters[:MOST_ADAPTERS], *([wanted] if wanted else [])]}
        return {reference: await models.fetch(adapter) for reference, adapter in known.items()}


def _base(reference: str, source: Source) -> tuple[str, Source]:
    """What has to be in memory for a model: itself, or what an adapter stands on."""
    adapter = _adapter(source)
    return (adapter.base_model, None) if adapter else (reference, source)


def _adapter(source: Source) -> Version | None:
    return source if isinstance(source, Version) and source.is_adapter else None


async def _find_base(reference: str) -> Version | None:
    return None if reference == tiny.NAME else await _find(reference)


async def _find_nothing(reference: str) -> None:
    return None


async def _find(reference: str) -> Version:
    async with registry.connect() as models:
        return await models.find(reference)


def _tell_router(references: list[str]) -> None:
    """Serve's own multiplexing does this for models that it unloads by their number; ours go by their size."""
    from ray import serve as ray_serve
    from ray.serve._private.common import RequestRoutingInfo
    from ray.serve.context import _get_global_client  # pyright: ignore[reportPrivateUsage]

    replica: Any = ray_serve.get_replica_context().replica_id
    client: Any = _get_global_client()
    client.record_request_routing_info(
        RequestRoutingInfo(replica_id=replica, multiplexed_model_ids=references)  # pyright: ignore[reportCallIssue]
    )
