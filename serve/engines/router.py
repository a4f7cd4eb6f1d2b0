"""Sends each call to the engine that runs the model."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from serve.engines.model_header import Header
from serve.engines.protocol import (
    Chunk,
    EmbeddingResult,
    Engine,
    EngineRequest,
    LoadedModelInfo,
    LoadingModelInfo,
    Ranking,
    Source,
)


class EngineRouter:
    """Satisfies protocol.Engine."""

    def __init__(self, default: Engine, by_source_type: Mapping[type, Engine]) -> None:
        """`by_source_type` maps types of sources to engines; `default` runs all others."""
        self._default = default
        self._by_source_type = by_source_type

    def chat(
        self, reference: str, request: EngineRequest, source: Source = None, account: str = ""
    ) -> AsyncGenerator[list[Chunk], None]:
        return self._engine_for(source).chat(reference, request, source, account)

    async def complete(
        self, reference: str, request: EngineRequest, source: Source = None, account: str = ""
    ) -> dict[str, Any]:
        return await self._engine_for(source).complete(reference, request, source, account)

    async def embed(
        self, reference: str, texts: Sequence[str], source: Source = None, account: str = ""
    ) -> EmbeddingResult:
        return await self._engine_for(source).embed(reference, texts, source, account)

    async def rank(
        self, reference: str, query: str, documents: Sequence[str], source: Source = None, account: str = ""
    ) -> Ranking:
        return await self._engine_for(source).rank(reference, query, documents, source, account)

    async def describe(self, reference: str, source: Source = None) -> Header:
        return await self._engine_for(source).describe(reference, source)

    async def load(self, reference: str, source: Source = None) -> str:
        return await self._engine_for(source).load(reference, source)

    async def unload(self, reference: str, source: Source = None) -> bool:
        return await self._engine_for(source).unload(reference, source)

    async def set_keep_alive(self, reference: str, seconds: float | None, source: Source = None) -> None:
        await self._engine_for(source).set_keep_alive(reference, seconds, source)

    async def loaded(self) -> list[LoadedModelInfo]:
        engines = [self._default, *self._by_source_type.values()]
        return [model for models in await asyncio.gather(*(engine.loaded() for engine in engines)) for model in models]

    async def loading(self) -> list[LoadingModelInfo]:
        engines = [self._default, *self._by_source_type.values()]
        return [model for models in await asyncio.gather(*(engine.loading() for engine in engines)) for model in models]

    def _engine_for(self, source: Source) -> Engine:
        return self._by_source_type.get(type(source), self._default)
