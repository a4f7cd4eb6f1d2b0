"""The engine that runs models in its own process. The GGUF and transformers engines share it."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from functools import partial
from time import perf_counter
from typing import Any, Generic, Protocol, TypeVar

import psutil

from cluster.errors import ForgearrError
from cluster.settings import EngineSettings
from cluster.times import parse_duration
from pipelines.training.models.registry import OnProgress
from pipelines.training.models.versions import Version
from serve.engines.collect import collect
from serve.engines.defaults import apply_defaults
from serve.engines.local.pool import MB, Closable, LoadPlan, ModelPool, Purpose
from serve.engines.model_header import Header
from serve.engines.protocol import (
    Chunk,
    EmbeddingResult,
    EngineRequest,
    LoadedModelInfo,
    LoadingModelInfo,
    Ranking,
    Source,
)


class EngineStalled(ForgearrError):
    """An engine hangs, and its process has to be replaced."""

    code = "ENGINE_STALLED"


class RunningModel(Closable, Protocol):
    def answer(self, request: EngineRequest, reference: str, account: str) -> AsyncGenerator[list[Chunk], None]:
        """Stream a completion of the model, or of its adapter `reference`. Closing the stream stops the model."""
        ...

    async def embed(self, texts: Sequence[str], account: str) -> EmbeddingResult: ...

    async def rank(self, query: str, documents: Sequence[str], account: str) -> Ranking: ...


Model = TypeVar("Model", bound=RunningModel)


class Loader(Protocol[Model]):
    """Finds the models that an engine can run, and prepares loading them."""

    async def prepare(
        self, reference: str, source: Source, purpose: Purpose, on_progress: OnProgress
    ) -> LoadPlan[Model]:
        """Fetch the model to this machine and compute its memory. `on_progress` takes bytes fetched, and all bytes."""
        ...

    async def describe(self, reference: str, source: Source) -> Header: ...


class LocalEngine(Generic[Model]):
    """Satisfies protocol.Engine."""

    def __init__(
        self,
        settings: EngineSettings,
        loader: Loader[Model],
        on_change: Callable[[list[str]], None] = lambda _: None,
    ) -> None:
        self._loader = loader
        capacity = settings.memory_mb * MB if settings.memory_mb else psutil.virtual_memory().total // 2
        self._pool = ModelPool[Model](capacity, settings, on_change)
        self._stall_timeout = None if settings.stall_timeout is None else parse_duration(settings.stall_timeout)

    async def chat(
        self, reference: str, request: EngineRequest, source: Source = None, account: str = ""
    ) -> AsyncGenerator[list[Chunk]]:
        started_at = perf_counter()
        if isinstance(source, Version):
            request = apply_defaults(request, source.defaults)
        async with self._use(reference, source, account=account) as model:
            load_ms = (perf_counter() - started_at) * 1000
            async with aclosing(model.answer(request, reference, account)) as stream:
                async for chunks in stream:
                    if timings := chunks[-1].get("timings"):
                        timings["load_ms"] = load_ms
                    yield chunks

    async def complete(
        self, reference: str, request: EngineRequest, source: Source = None, account: str = ""
    ) -> dict[str, Any]:
        return await collect(self.chat(reference, request, source, account))

    async def embed(
        self, reference: str, texts: Sequence[str], source: Source = None, account: str = ""
    ) -> EmbeddingResult:
        async with self._use(reference, source, "embeddings", account) as model:
            return await model.embed(texts, account)

    async def rank(
        self, reference: str, query: str, documents: Sequence[str], source: Source = None, account: str = ""
    ) -> Ranking:
        async with self._use(reference, source, "embeddings", account) as model:
            return await model.rank(query, documents, account)

    async def describe(self, reference: str, source: Source = None) -> Header:
        return await self._loader.describe(reference, source)

    async def load(self, reference: str, source: Source = None) -> str:
        async with self._use(reference, source):
            return reference

    async def unload(self, reference: str, source: Source = None) -> bool:
        return await self._pool.unload(reference)

    async def set_keep_alive(self, reference: str, seconds: float | None, source: Source = None) -> None:
        await self._pool.set_keep_alive(reference, seconds)

    async def loaded(self) -> list[LoadedModelInfo]:
        return self.loaded_models

    async def loading(self) -> list[LoadingModelInfo]:
        return self._pool.loading()

    async def check_health(self) -> None:
        """Called by Serve, which replaces the process of an unhealthy replica.

        A chat template may loop for ever on a particular message, and nothing can stop it within the process.
        """
        if self._stall_timeout is not None and (stalled := self._pool.stalled(self._stall_timeout)):
            raise EngineStalled(
                f"{', '.join(stalled)} has shown no progress for {self._stall_timeout:g} s (engines.stall_timeout), so "
                "this process is replaced. If the model is only slow, raise that setting."
            )

    @property
    def loaded_models(self) -> list[LoadedModelInfo]:
        return [
            LoadedModelInfo(pooled.reference, pooled.bytes, pooled.context, pooled.users, pooled.leaves_at)
            for pooled in self._pool.loaded()
        ]

    def _use(
        self, reference: str, source: Source, purpose: Purpose = "answers", account: str = ""
    ) -> AbstractAsyncContextManager[Model]:
        prepare = partial(self._loader.prepare, reference, source, purpose)
        return self._pool.use(reference, prepare, purpose, account=account)


def report_models_to_router(references: list[str]) -> None:
    """Tell Serve's router which models this replica has in memory.

    Serve's own multiplexing does this only for models that it unloads by their number. The pool unloads by memory.
    """
    from ray import serve as ray_serve
    from ray.serve._private.common import RequestRoutingInfo
    from ray.serve.context import _get_global_client  # pyright: ignore[reportPrivateUsage]

    replica: Any = ray_serve.get_replica_context().replica_id
    client: Any = _get_global_client()
    client.record_request_routing_info(
        RequestRoutingInfo(replica_id=replica, multiplexed_model_ids=references)  # pyright: ignore[reportCallIssue]
    )
