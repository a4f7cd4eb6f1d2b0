"""Several answers to one request: given one after the other, so that a single request never fills the queue."""

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from serve.engines.protocol import Chunk, Engine
from serve.engines.protocol import Request as EngineRequest
from serve.models import Meant


async def complete(engine: Engine, meant: Meant, requests: Iterable[EngineRequest]) -> list[dict[str, Any]]:
    """Each whole answer: a choice, and what it used."""
    return [await engine.complete(meant.reference, request, meant.source) for request in requests]


async def speak(engine: Engine, meant: Meant, requests: Iterable[EngineRequest]) -> AsyncGenerator[list[Chunk]]:
    """The same as it is made. A choice's index says which of them it is; what has a usage ends one."""
    for index, request in enumerate(requests):
        async with aclosing(engine.chat(meant.reference, request, meant.source)) as answer:
            async for chunks in answer:
                yield [
                    {**chunk, "choices": [{**choice, "index": index} for choice in chunk["choices"]]}
                    for chunk in chunks
                ]


def of_prompts(usages: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """What answers to different prompts used together."""
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    return {name: sum(usage[name] for usage in usages) for name in names}


def of_one_prompt(usages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What several answers to the same prompt used, which counts once."""
    said = sum(usage["completion_tokens"] for usage in usages)
    return {**usages[0], "completion_tokens": said, "total_tokens": usages[0]["prompt_tokens"] + said}
