"""The engines of an installation as one: what a name means decides which of them answers."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from serve.engines.model_header import Header
from serve.engines.protocol import Chunk, Embedded, Engine, Held, Loading, Ranked, Request, Source


class ChosenEngine:
    """Satisfies protocol.Engine."""

    def __init__(self, usual: Engine, others: Mapping[type, Engine]) -> None:
        """`others` are by the kind of source that they are for."""
        self._usual = usual
        self._others = others

    def chat(self, reference: str, request: Request, source: Source = None) -> AsyncGenerator[list[Chunk], None]:
        return self._of(source).chat(reference, request, source)

    async def complete(self, reference: str, request: Request, source: Source = None) -> dict[str, Any]:
        return await self._of(source).complete(reference, request, source)

    async def embed(self, reference: str, texts: Sequence[str], source: Source = None) -> Embedded:
        return await self._of(source).embed(reference, texts, source)

    async def rank(self, reference: str, query: str, documents: Sequence[str], source: Source = None) -> Ranked:
        return await self._of(source).rank(reference, query, documents, source)

    async def describe(self, reference: str, source: Source = None) -> Header:
        return await self._of(source).describe(reference, source)

    async def load(self, reference: str, source: Source = None) -> str:
        return await self._of(source).load(reference, source)

    async def unload(self, reference: str, source: Source = None) -> bool:
        return await self._of(source).unload(reference, source)

    async def keep(self, reference: str, seconds: float | None, source: Source = None) -> None:
        await self._of(source).keep(reference, seconds, source)

    async def loaded(self) -> list[Held]:
        engines = [self._usual, *self._others.values()]
        return [held for models in await asyncio.gather(*(engine.loaded() for engine in engines)) for held in models]

    async def loading(self) -> list[Loading]:
        engines = [self._usual, *self._others.values()]
        return [model for models in await asyncio.gather(*(engine.loading() for engine in engines)) for model in models]

    def _of(self, source: Source) -> Engine:
        return self._others.get(type(source), self._usual)
