"""The gateway's client of an engine: calls a deployment on Ray Serve, and translates its errors into Forgearr's."""

import asyncio
import sys
import threading
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from cluster.errors import ForgearrError
from cluster.settings import get_settings
from serve.engines.model_header import Header
from serve.engines.protocol import (
    Chunk,
    EmbeddingResult,
    EngineFailed,
    EngineLost,
    EngineRequest,
    EngineUnavailable,
    LoadedModelInfo,
    LoadingModelInfo,
    Ranking,
    Source,
)
from serve.engines.read_ahead import read_ahead

BROADCAST_TIMEOUT_SECONDS = 30

_handle_lock = threading.Lock()
"""Serve returns the same handle to all callers in this process; it can be initialized once only."""


class DeploymentEngine:
    """Satisfies protocol.Engine."""

    def __init__(self, deployment: str, replicas_setting: str, *, separate_loop: bool = False) -> None:
        """`replicas_setting` names the setting in the section `engines` that has the number of replicas.

        In Serve's throughput mode a handle works only in the event loop of its first caller. With `separate_loop` it
        has a loop of its own, and works in all.
        """
        self._deployment = deployment
        self._separate_loop = separate_loop
        self._replicas_setting = replicas_setting
        self._handle: Any = None

    def chat(
        self, reference: str, request: EngineRequest, source: Source = None, account: str = ""
    ) -> AsyncGenerator[list[Chunk]]:
        return read_ahead(self._chat(reference, request, source, account))

    async def complete(
        self, reference: str, request: EngineRequest, source: Source = None, account: str = ""
    ) -> dict[str, Any]:
        handle = (await self._get_handle()).options(**self._routing(reference))
        with _translate_errors():
            response = handle.complete.remote(reference, request, source, account)
            try:
                return await response
            finally:
                response.cancel()

    async def embed(
        self, reference: str, texts: Sequence[str], source: Source = None, account: str = ""
    ) -> EmbeddingResult:
        handle = (await self._get_handle()).options(**self._routing(reference))
        with _translate_errors():
            return await handle.embed.remote(reference, texts, source, account)

    async def rank(
        self, reference: str, query: str, documents: Sequence[str], source: Source = None, account: str = ""
    ) -> Ranking:
        handle = (await self._get_handle()).options(**self._routing(reference))
        with _translate_errors():
            return await handle.rank.remote(reference, query, documents, source, account)

    async def describe(self, reference: str, source: Source = None) -> Header:
        handle = (await self._get_handle()).options(**self._routing(reference))
        with _translate_errors():
            return await handle.describe.remote(reference, source)

    async def load(self, reference: str, source: Source = None) -> str:
        handle = (await self._get_handle()).options(**self._routing(reference))
        with _translate_errors():
            return await handle.load.remote(reference, source)

    async def unload(self, reference: str, source: Source = None) -> bool:
        return any(await self._broadcast("unload", reference))

    async def set_keep_alive(self, reference: str, seconds: float | None, source: Source = None) -> None:
        await self._broadcast("set_keep_alive", reference, seconds, source)

    async def loaded(self) -> list[LoadedModelInfo]:
        return [model for models in await self._broadcast("loaded") for model in models]

    async def loading(self) -> list[LoadingModelInfo]:
        return [model for models in await self._broadcast("loading") for model in models]

    async def _chat(
        self, reference: str, request: EngineRequest, source: Source, account: str
    ) -> AsyncGenerator[list[Chunk]]:
        handle = (await self._get_handle()).options(stream=True, **self._routing(reference))
        with _translate_errors():
            response = handle.chat.remote(reference, request, source, account)
            try:
                async for chunks in response:
                    yield chunks
            finally:
                response.cancel()

    async def _broadcast(self, method: str, *arguments: Any) -> list[Any]:
        """Call every replica, because each has its own models. If no replica runs, none is started."""
        if not self._replicas:
            return []
        handle = await self._get_handle()
        from ray.serve.exceptions import DeploymentUnavailableError

        with _translate_errors(), suppress(DeploymentUnavailableError):
            return await handle.broadcast(method, *arguments).results_async(timeout_s=BROADCAST_TIMEOUT_SECONDS)
        return []

    async def _get_handle(self) -> Any:
        # In a process that has not joined Ray, a call of Serve would start a new cluster.
        ray: Any = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            raise EngineUnavailable("This process is not part of the cluster and cannot reach an engine.")
        if not self._replicas:
            raise EngineUnavailable(
                f"No engine runs for this model: set engines.{self._replicas_setting} to 1 or more, then restart."
            )
        if self._handle is None:
            self._handle = await asyncio.to_thread(_create_handle, self._deployment, self._separate_loop)
        return self._handle

    def _routing(self, reference: str) -> dict[str, str]:
        """Prefer a replica that has the model. With one replica, Serve's matching would only cost time."""
        return {"multiplexed_model_id": reference} if self._replicas > 1 else {}

    @property
    def _replicas(self) -> int:
        return getattr(get_settings().engines, self._replicas_setting)


def _create_handle(deployment: str, separate_loop: bool) -> Any:
    from ray import serve as ray_serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        with _handle_lock:
            handle: Any = ray_serve.get_deployment_handle(deployment, app_name=get_settings().ray_namespace)
            if separate_loop and not handle.is_initialized:
                handle._init(_run_router_in_separate_loop=True)
    except (KeyError, RayError, RayServeException) as error:  # a KeyError while the application is being deployed
        raise EngineUnavailable from error
    return handle


@contextmanager
def _translate_errors() -> Generator[None]:
    """Translate the errors of Ray and of the engine into Forgearr's. Callers see no others."""
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
