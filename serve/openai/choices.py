"""Several answers to one request: side by side, as many as a model gives at once; so the queue stays for others."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from cluster.settings import get_settings
from serve.engines.protocol import Chunk, Engine
from serve.engines.protocol import Request as EngineRequest
from serve.models.resolver import Meant


async def complete(engine: Engine, meant: Meant, requests: Sequence[EngineRequest]) -> list[dict[str, Any]]:
    """Each whole answer: a choice, and what it used."""
    places = asyncio.Semaphore(get_settings().engines.slots)

    async def answer(request: EngineRequest) -> dict[str, Any]:
        async with places:
            return await engine.complete(meant.reference, request, meant.source)

    answering = [asyncio.ensure_future(answer(request)) for request in requests]
    try:
        return await asyncio.gather(*answering)
    finally:
        _stop(answering)


async def speak(engine: Engine, meant: Meant, requests: Sequence[EngineRequest]) -> AsyncGenerator[list[Chunk]]:
    """The same as it is made. A choice's index says which of them it is; what has a usage ends one."""
    places = asyncio.Semaphore(get_settings().engines.slots)
    heard = asyncio.Queue[list[Chunk] | Exception | None](maxsize=1)

    async def answer(index: int, request: EngineRequest) -> None:
        try:
            async with places, aclosing(engine.chat(meant.reference, request, meant.source)) as spoken:
                async for chunks in spoken:
                    await heard.put([_numbered(chunk, index) for chunk in chunks])
            await heard.put(None)
        except Exception as error:
            await heard.put(error)

    answering = [asyncio.ensure_future(answer(index, request)) for index, request in enumerate(requests)]
    unfinished = len(answering)
    try:
        while unfinished:
            told = await heard.get()
            if isinstance(told, Exception):
                raise told
            if told is None:
                unfinished -= 1
            else:
                yield told
    finally:
        _stop(answering)


def _numbered(chunk: Chunk, index: int) -> Chunk:
    return {**chunk, "choices": [{**choice, "index": index} for choice in chunk["choices"]]}


def _stop(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()


def of_prompts(usages: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """What answers to different prompts used together."""
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    return {name: sum(usage[name] for usage in usages) for name in names}


def of_one_prompt(usages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What several answers to the same prompt used, which counts once."""
    said = sum(usage["completion_tokens"] for usage in usages)
    return {**usages[0], "completion_tokens": said, "total_tokens": usages[0]["prompt_tokens"] + said}
