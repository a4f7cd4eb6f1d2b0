"""The engine as the gateway sees it: calls of a deployment on Ray Serve, and their errors in our own words."""

import asyncio
import sys
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from cluster.errors import ForgearrError
from cluster.settings import get_settings
from pipelines.training.registry import Version
from serve.engines.header import Header
from serve.engines.protocol import Chunk, Embedded, EngineFailed, EngineLost, EngineUnavailable, Held, Request

DEPLOYMENT = "gguf"
APPLICATION = "forgearr"
ASK_SECONDS = 30


class RemoteEngine:
    """Satisfies protocol.Engine."""

    def __init__(self) -> None:
        self._handle: Any = None

    async def chat(
        self, reference: str, request: Request, version: Version | None = None
    ) -> AsyncGenerator[list[Chunk]]:
        handle = (await self._find()).options(stream=True, **_routing(reference))
        with _our_errors():
            answer = handle.chat.remote(reference, request, version)
            try:
                async for chunks in answer:
                    yield chunks
            finally:
                answer.cancel()

    async def complete(self, reference: str, request: Request, version: Version | None = None) -> dict[str, Any]:
        handle = (await self._find()).options(**_routing(reference))
        with _our_errors():
            answer = handle.complete.remote(reference, request, version)
            try:
                return await answer
            finally:
                answer.cancel()

    async def embed(self, reference: str, texts: Sequence[str], version: Version | None = None) -> Embedded:
        handle = (await self._find()).options(**_routing(reference))
        with _our_errors():
            return await handle.embed.remote(reference, texts, version)

    async def describe(self, reference: str, version: Version | None = None) -> Header:
        handle = (await self._find()).options(**_routing(reference))
        with _our_errors():
            return await handle.describe.remote(reference, version)

    async def load(self, reference: str) -> str:
        handle = (await self._find()).options(**_routing(reference))
        with _our_errors():
            return await handle.load.remote(reference)

    async def unload(self, reference: str) -> bool:
        return any(await self._ask_all("unload", reference))

    async def loaded(self) -> list[Held]:
        return [held for found in await self._ask_all("loaded") for held in found]

    async def _ask_all(self, method: str, *arguments: Any) -> list[Any]:
        """Each replica holds models of its own."""
        handle = await self._find()
        with _our_errors():
            return await handle.broadcast(method, *arguments).results_async(timeout_s=ASK_SECONDS)

    async def _find(self) -> Any:
        # A process that has not joined Ray must not do so by the way: Ray would start a cluster of its own for it.
        ray: Any = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            raise EngineUnavailable("This process is not part of the cluster and cannot reach an engine.")
        if get_settings().engines.replicas == 0:
            raise EngineUnavailable("No engine runs here: set engines.replicas to 1 or more and start Forgearr again.")
        if self._handle is None:
            self._handle = await asyncio.to_thread(_handle)
        return self._handle


def _routing(reference: str) -> dict[str, str]:
    """Of several replicas, one that holds the model. For a single one, Serve's matching would only cost time."""
    return {"multiplexed_model_id": reference} if get_settings().engines.replicas > 1 else {}


def _handle() -> Any:
    from ray import serve as ray_serve
    from ray.serve.exceptions import RayServeException

    try:
        return ray_serve.get_deployment_handle(DEPLOYMENT, app_name=APPLICATION)
    except RayServeException as error:
        raise EngineUnavailable from error


@contextmanager
def _our_errors() -> Generator[None]:
    """The one line of defence: what goes wrong in Ray, or in the engine, is one of our errors above."""
    import ray.exceptions
    from ray.serve.exceptions import RayServeException

    try:
        yield
    except ray.exceptions.RayTaskError as error:
        cause: Any = error.cause
        if isinstance(cause, ForgearrError):
            raise cause from None
        raise EngineFailed(f"The engine could not answer: {type(cause).__name__}.") from error
    except (ray.exceptions.RayActorError, ray.exceptions.ActorUnavailableError) as error:
        raise EngineLost from error
    except (RayServeException, TimeoutError) as error:
        raise EngineUnavailable from error
