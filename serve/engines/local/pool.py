"""The pool of loaded models of an engine. It unloads the least recently used ones when others need the memory.

Everything here runs on one event loop. A model is loaded once for all requests that wait for it, and is not unloaded
while it is used. Adapters are loaded together with their base model. For an adapter that was registered later the base
model is loaded again; its outdated copy is unloaded after its last request.
"""

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from time import monotonic
from typing import Generic, Literal, Protocol, TypeVar

import psutil

from cluster.db import now
from cluster.settings import EngineSettings
from cluster.times import parse_duration
from pipelines.training.models.registry import OnProgress
from serve.engines.protocol import EngineBusy, LoadingModelInfo, ModelTooLarge, Phase

log = logging.getLogger(__name__)

MAKE_ROOM_TIMEOUT_SECONDS = 120
MAX_KEEP_ALIVE_SECONDS = 10 * 365 * 86_400.0
"""Longer than any process lives. Timers and dates could not represent every number of seconds."""
MB = 1024 * 1024

Purpose = Literal["answers", "embeddings"]
"""What a model is loaded for. Each needs its own way of loading."""


class Closable(Protocol):
    @property
    def adapters(self) -> Sequence[str]:
        """References of the adapters that are loaded with the model."""
        ...

    def close(self) -> None:
        """Free the memory. It is slow, and no request may be in progress."""
        ...

    @property
    def silent_seconds(self) -> float:
        """For how long the request that is stuck the longest has shown no progress; 0: there is no request."""
        ...


Model = TypeVar("Model", bound=Closable)


@dataclass(frozen=True)
class LoadPlan(Generic[Model]):
    """How to load a model, and the memory that it needs."""

    bytes: int
    breakdown: str  # what needs the memory, for error messages
    remedy: str  # how to need less, for error messages
    context: int
    load: Callable[[], Model]  # slow: called in a thread


Prepare = Callable[[OnProgress], Awaitable[LoadPlan[Model]]]


@dataclass(eq=False)
class PooledModel(Generic[Model]):
    reference: str
    purpose: Purpose
    loading: asyncio.Task[Model] = field(init=False)
    phase: Phase = "fetching"
    fetched: tuple[int, int] | None = None  # bytes so far, and all bytes
    requested_at: float = field(default_factory=monotonic)
    users: int = 0
    users_by_account: Counter[str] = field(default_factory=Counter[str])
    bytes: int = 0  # 0 until they are reserved
    memory_before: int = 0  # of the process, when loading began
    loading_since: float = 0  # when the phase `loading` began
    context: int = 0
    unload_when_idle: bool = False
    keep_alive: float | None = None  # seconds after its last request; None: until its memory is needed
    unload_timer: asyncio.TimerHandle | None = None  # runs while the model is idle
    idle_since: datetime = field(default_factory=now)

    @property
    def key(self) -> tuple[str, Purpose]:
        return self.reference, self.purpose

    @property
    def is_loaded(self) -> bool:
        return self.loading.done() and not self.loading.cancelled() and self.loading.exception() is None

    @property
    def leaves_at(self) -> datetime | None:
        if self.keep_alive is None:
            return None
        return (self.idle_since if self.unload_timer else now()) + timedelta(
            seconds=min(self.keep_alive, MAX_KEEP_ALIVE_SECONDS)
        )

    @property
    def progress(self) -> float | None:
        """Of the present phase, from 0 to 1; None: unknown."""
        if self.phase == "fetching" and self.fetched is not None:
            return self.fetched[0] / self.fetched[1]
        if self.phase == "loading":  # llama.cpp reports none: the growth of the process is an estimate
            return min(max(_process_memory() - self.memory_before, 0) / self.bytes, 1.0)
        return None

    @property
    def is_idle(self) -> bool:
        return self.is_loaded and not self.users

    @property
    def silent_seconds(self) -> float:
        """For how long loading it, or one of its requests, has shown no progress."""
        if self.is_loaded:
            return self.loading.result().silent_seconds
        return monotonic() - self.loading_since if self.loading_since and not self.loading.done() else 0


class ModelPool(Generic[Model]):
    def __init__(
        self, capacity: int, settings: EngineSettings, on_change: Callable[[list[str]], None] = lambda _: None
    ) -> None:
        self._capacity = capacity
        self._settings = settings
        self._on_change = on_change
        self._current = OrderedDict[tuple[str, Purpose], PooledModel[Model]]()  # the most recently used last
        self._outdated: list[PooledModel[Model]] = []  # replaced; unloaded after their last request
        self._unloading_bytes = 0  # bytes of models that are being unloaded
        self._freed = asyncio.Event()  # set whenever memory may have become free
        self._default_keep_alive = None if settings.keep_alive is None else parse_duration(settings.keep_alive)
        self._unload_tasks = set[asyncio.Task[None]]()  # asyncio has weak references only

    def loaded(self) -> list[PooledModel[Model]]:
        return [pooled for pooled in self._all_models() if pooled.is_loaded]

    def loading(self) -> list[LoadingModelInfo]:
        return [
            LoadingModelInfo(
                pooled.reference, pooled.phase, pooled.progress, pooled.bytes or None, monotonic() - pooled.requested_at
            )
            for pooled in self._all_models()
            if not pooled.loading.done()
        ]

    def stalled(self, timeout: float) -> list[str]:
        """The models whose loading, or one of whose answers, has shown no progress for this many seconds."""
        return [pooled.reference for pooled in self._all_models() if pooled.silent_seconds > timeout]

    @asynccontextmanager
    async def use(
        self,
        reference: str,
        prepare: Prepare[Model],
        purpose: Purpose = "answers",
        is_suitable: Callable[[Model], bool] = lambda _: True,
        account: str = "",
    ) -> AsyncGenerator[Model]:
        """The model, which is not unloaded within this context.

        It is loaded with `prepare` if it is not in memory, or if the copy in memory is not suitable. One account may
        have half of the places in the queue, so that it cannot keep all others out.
        """
        while True:
            pooled = self._current.get((reference, purpose)) or self._start_loading(
                PooledModel(reference, purpose), prepare
            )
            self._require_place(pooled, account)
            pooled.users += 1
            pooled.users_by_account[account] += 1
            self._stop_unload_timer(pooled)
            pooled.keep_alive = self._default_keep_alive
            pooled.unload_when_idle = self._default_keep_alive == 0
            self._current.move_to_end(pooled.key)
            try:
                model = await asyncio.shield(pooled.loading)
                if is_suitable(model):
                    yield model
                    return
                self._mark_outdated(pooled)
            finally:
                pooled.users -= 1
                pooled.users_by_account[account] -= 1
                await self._remove_if_due(pooled)
                self._start_unload_timer(pooled)
                self._freed.set()

    async def set_keep_alive(self, reference: str, seconds: float | None) -> None:
        """Set how long a model stays after its last request. None: until its memory is needed."""
        if seconds == 0:
            await self.unload(reference)
            return
        for pooled in self._current.values():
            if pooled.reference == reference:
                self._stop_unload_timer(pooled)
                pooled.keep_alive, pooled.unload_when_idle = seconds, False
                self._start_unload_timer(pooled)

    async def unload(self, reference: str) -> bool:
        """Unload a model after its last request. Returns whether it was loaded, or being loaded."""
        matching = [pooled for pooled in self._all_models() if pooled.reference == reference]
        for pooled in matching:
            pooled.unload_when_idle = True
        for pooled in matching:
            await asyncio.wait([pooled.loading])
            await self._remove_if_due(pooled)
        return bool(matching)

    def _require_place(self, pooled: PooledModel[Model], account: str) -> None:
        slots, queue = self._settings.slots, self._settings.queue
        if pooled.users >= slots + queue:
            raise EngineBusy
        if account and pooled.users_by_account[account] >= slots + (queue + 1) // 2:
            raise EngineBusy(
                f"{pooled.users_by_account[account]} requests of your account wait for this model already, and one "
                "account may have half of the queue (engines.queue); try again in a moment."
            )

    def _start_unload_timer(self, pooled: PooledModel[Model]) -> None:
        if pooled.keep_alive is not None and pooled.is_idle and pooled in self._all_models():
            loop = asyncio.get_running_loop()
            pooled.idle_since = now()
            pooled.unload_timer = loop.call_later(
                min(pooled.keep_alive, MAX_KEEP_ALIVE_SECONDS), self._on_unload_timer, pooled
            )

    def _stop_unload_timer(self, pooled: PooledModel[Model]) -> None:
        if pooled.unload_timer is not None:
            pooled.unload_timer.cancel()
            pooled.unload_timer = None

    def _on_unload_timer(self, pooled: PooledModel[Model]) -> None:
        pooled.unload_timer = None
        pooled.unload_when_idle = True
        task = asyncio.create_task(self._remove_if_due(pooled))
        self._unload_tasks.add(task)
        task.add_done_callback(self._unload_tasks.discard)

    def _all_models(self) -> list[PooledModel[Model]]:
        return [*self._outdated, *self._current.values()]

    def _start_loading(self, pooled: PooledModel[Model], prepare: Prepare[Model]) -> PooledModel[Model]:
        self._current[pooled.key] = pooled
        pooled.loading = asyncio.create_task(self._load(pooled, prepare))
        pooled.loading.add_done_callback(lambda _: self._on_load_done(pooled))
        self._notify_change()
        return pooled

    def _on_load_done(self, pooled: PooledModel[Model]) -> None:
        """Remove a model that could not be loaded. Requests that wait for it get the error."""
        if not pooled.is_loaded:
            del self._current[pooled.key]
            self._notify_change()

    def _mark_outdated(self, pooled: PooledModel[Model]) -> None:
        if self._current.get(pooled.key) is pooled:
            del self._current[pooled.key]
            self._outdated.append(pooled)
        pooled.unload_when_idle = True

    async def _load(self, pooled: PooledModel[Model], prepare: Prepare[Model]) -> Model:
        def on_progress(done: int, total: int) -> None:
            pooled.fetched = done, total

        plan = await prepare(on_progress)
        pooled.context = plan.context
        if plan.bytes > self._capacity:
            raise ModelTooLarge(
                f"{pooled.reference} needs {plan.bytes // MB} MB ({plan.breakdown}), and engines.memory_mb allows "
                f"{self._capacity // MB} MB. Raise that, lower engines.context or engines.slots, or {plan.remedy}."
            )
        pooled.phase = "waiting for room"
        await self._make_room(pooled, plan.bytes)
        pooled.phase, pooled.memory_before, pooled.loading_since = "loading", _process_memory(), monotonic()
        model = await asyncio.to_thread(plan.load)
        log.info("%s is loaded: %d MB", pooled.reference, plan.bytes // MB)
        return model

    async def _make_room(self, pooled: PooledModel[Model], needed: int) -> None:
        try:
            async with asyncio.timeout(MAKE_ROOM_TIMEOUT_SECONDS):
                while (
                    sum(other.bytes for other in self._all_models()) + self._unloading_bytes + needed > self._capacity
                ):
                    idle = next((other for other in self._all_models() if other.bytes and other.is_idle), None)
                    if idle is None:
                        self._freed.clear()
                        await self._freed.wait()
                    else:
                        await self._remove(idle)
                pooled.bytes = needed
        except TimeoutError:
            raise EngineBusy(
                f"{pooled.reference} needs {needed // MB} of the {self._capacity // MB} MB that engines.memory_mb "
                f"allows, and the models that take them were all in use for {MAKE_ROOM_TIMEOUT_SECONDS} seconds."
            ) from None

    async def _remove_if_due(self, pooled: PooledModel[Model]) -> None:
        if pooled.unload_when_idle and pooled.is_idle and pooled in self._all_models():
            await self._remove(pooled)

    async def _remove(self, pooled: PooledModel[Model]) -> None:
        self._stop_unload_timer(pooled)
        if pooled in self._outdated:
            self._outdated.remove(pooled)
        else:
            del self._current[pooled.key]
        self._unloading_bytes += pooled.bytes
        try:
            await asyncio.shield(asyncio.to_thread(pooled.loading.result().close))
        finally:
            self._unloading_bytes -= pooled.bytes
            self._freed.set()
        log.info("%s is unloaded", pooled.reference)
        self._notify_change()

    def _notify_change(self) -> None:
        adapters = [name for pooled in self.loaded() for name in pooled.loading.result().adapters]
        self._on_change(list(dict.fromkeys([*(pooled.reference for pooled in self._current.values()), *adapters])))


def _process_memory() -> int:
    return psutil.Process().memory_info().rss
