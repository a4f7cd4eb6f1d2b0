"""Creates all choices of one request, at most as many at a time as a model has slots.

More of them would only fill the queue of the engine, which other requests need too.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from cluster.settings import get_settings
from serve.engines.protocol import Chunk, Engine
from serve.engines.protocol import EngineRequest as EngineRequest
from serve.models.resolver import ResolvedModel


async def complete_all(engine: Engine, model: ResolvedModel, requests: Sequence[EngineRequest]) -> list[dict[str, Any]]:
    """Complete every request. Each result has one choice, and its usage."""
    semaphore = asyncio.Semaphore(get_settings().engines.slots)

    async def complete(request: EngineRequest) -> dict[str, Any]:
        async with semaphore:
            return await engine.complete(model.reference, request, model.source, model.account)

    tasks = [asyncio.ensure_future(complete(request)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        _stop(tasks)


async def stream_all(
    engine: Engine, model: ResolvedModel, requests: Sequence[EngineRequest]
) -> AsyncGenerator[list[Chunk]]:
    """Stream all completions together.

    The index of a choice is the position of its request. The chunk with its usage is the last one of a request.
    """
    semaphore = asyncio.Semaphore(get_settings().engines.slots)
    queue = asyncio.Queue[list[Chunk] | Exception | None](maxsize=1)

    async def stream_one(index: int, request: EngineRequest) -> None:
        try:
            async with (
                semaphore,
                aclosing(engine.chat(model.reference, request, model.source, model.account)) as stream,
            ):
                async for chunks in stream:
                    await queue.put([_with_choice_index(chunk, index) for chunk in chunks])
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.ensure_future(stream_one(index, request)) for index, request in enumerate(requests)]
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
    """The usage of completions of different prompts."""
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    return {name: sum(usage[name] for usage in usages) for name in names}


def sum_choice_usage(usages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The usage of choices for the same prompt, which counts once."""
    completion_tokens = sum(usage["completion_tokens"] for usage in usages)
    return {
        **usages[0],
        "completion_tokens": completion_tokens,
        "total_tokens": usages[0]["prompt_tokens"] + completion_tokens,
    }
