"""Several answers to one request: side by side, as many as a model gives at once; so the queue stays for others."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from cluster.settings import get_settings
from serve.engines.protocol import Chunk, Engine
from serve.engines.protocol import EngineRequest as EngineRequest
from serve.models.resolver import ResolvedModel


async def complete_all(engine: Engine, model: ResolvedModel, requests: Sequence[EngineRequest]) -> list[dict[str, Any]]:
    """Each whole answer: a choice, and what it used."""
    semaphore = asyncio.Semaphore(get_settings().engines.slots)

    async def answer(request: EngineRequest) -> dict[str, Any]:
        async with semaphore:
            return await engine.complete(model.reference, request, model.source)

    tasks = [asyncio.ensure_future(answer(request)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        _stop(tasks)


async def stream_all(
    engine: Engine, model: ResolvedModel, requests: Sequence[EngineRequest]
) -> AsyncGenerator[list[Chunk]]:
    """The same as it is made. A choice's index says which of them it is; what has a usage ends one."""
    semaphore = asyncio.Semaphore(get_settings().engines.slots)
    queue = asyncio.Queue[list[Chunk] | Exception | None](maxsize=1)

    async def answer(index: int, request: EngineRequest) -> None:
        try:
            async with semaphore, aclosing(engine.chat(model.reference, request, model.source)) as stream:
                async for chunks in stream:
                    await queue.put([_with_choice_index(chunk, index) for chunk in chunks])
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.ensure_future(answer(index, request)) for index, request in enumerate(requests)]
    unfinished = len(tasks)
    try:
        while unfinished:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                unfinished -= 1
            else:
                yield item
    finally:
        _stop(tasks)


def _with_choice_index(chunk: Chunk, index: int) -> Chunk:
    return {**chunk, "choices": [{**choice, "index": index} for choice in chunk["choices"]]}


def _stop(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()


def sum_usage(usages: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """What answers to different prompts used together."""
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    return {name: sum(usage[name] for usage in usages) for name in names}


def sum_choice_usage(usages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What several answers to the same prompt used, which counts once."""
    completion_tokens = sum(usage["completion_tokens"] for usage in usages)
    return {
        **usages[0],
        "completion_tokens": completion_tokens,
        "total_tokens": usages[0]["prompt_tokens"] + completion_tokens,
    }
