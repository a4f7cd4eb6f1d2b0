"""The models that an engine holds: as many as fit into its memory, the least recently used make room for others.

Everything here happens on one event loop. A model is loaded once, however many wait for it; one that is in use stays.
Adapters are loaded with the model that they stand on. For one that came later the model is loaded once more, and the
old one leaves when its last answer is given.
"""

import asyncio
import logging
from collections import OrderedDict
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
"""Longer than any process lives."""
MB = 1024 * 1024

Purpose = Literal["answers", "embeddings"]
"""A model is prepared for one of them."""


class Closable(Protocol):
    @property
    def adapters(self) -> Sequence[str]:
        """The references of what stands on it, and is answered for by it too."""
        ...

    def close(self) -> None:
        """Give the memory back. It takes a while, and nobody may be waiting for an answer."""
        ...


Model = TypeVar("Model", bound=Closable)


@dataclass(frozen=True)
class LoadPlan(Generic[Model]):
    """A model that could be loaded: what it needs, and how it is done."""

    bytes: int
    breakdown: str  # what needs them, in words
    remedy: str  # what would make it need less
    context: int
    load: Callable[[], Model]  # takes a while, and so has a thread of its own


Prepare = Callable[[OnProgress], Awaitable[LoadPlan[Model]]]


@dataclass(eq=False)
class PooledModel(Generic[Model]):
    reference: str
    purpose: Purpose
    loading: asyncio.Task[Model] = field(init=False)
    phase: Phase = "fetching"
    fetched: tuple[int, int] | None = None  # bytes of how many
    requested_at: float = field(default_factory=monotonic)
    users: int = 0
    bytes: int = 0  # reserved as soon as there is room for it
    memory_before: int = 0  # of the process, when it began to load
    context: int = 0
    unload_when_idle: bool = False  # to be unloaded as soon as nobody uses it
    keep_alive: float | None = None  # seconds that it stays after its last answer; None: until its memory is needed
    unload_timer: asyncio.TimerHandle | None = None  # while nobody uses it and its time runs
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
        """Which part of its phase is done."""
        if self.phase == "fetching" and self.fetched is not None:
            return self.fetched[0] / self.fetched[1]
        if self.phase == "loading":  # llama.cpp does not tell; what the process has taken since then does, nearly
            return min(max(_process_memory() - self.memory_before, 0) / self.bytes, 1.0)
        return None

    @property
    def is_idle(self) -> bool:
        return self.is_loaded and not self.users


class ModelPool(Generic[Model]):
    def __init__(
        self, capacity: int, settings: EngineSettings, on_change: Callable[[list[str]], None] = lambda _: None
    ) -> None:
        self._capacity = capacity
        self._settings = settings
        self._on_change = on_change
        self._entries = OrderedDict[tuple[str, Purpose], PooledModel[Model]]()  # the most recently used last
        self._outdated: list[
            PooledModel[Model]
        ] = []  # others have taken their place; they leave after their last answer
        self._unloading_bytes = 0  # bytes of models that are being unloaded
        self._freed = asyncio.Event()  # set whenever there may be more room
        self._default_keep_alive = None if settings.keep_alive is None else parse_duration(settings.keep_alive)
        self._unload_tasks = set[asyncio.Task[None]]()  # asyncio itself would forget them

    def loaded(self) -> list[PooledModel[Model]]:
        return [entry for entry in self._all_entries() if entry.is_loaded]

    def loading(self) -> list[LoadingModelInfo]:
        return [
            LoadingModelInfo(
                entry.reference, entry.phase, entry.progress, entry.bytes or None, monotonic() - entry.requested_at
            )
            for entry in self._all_entries()
            if not entry.loading.done()
        ]

    @asynccontextmanager
    async def use(
        self,
        reference: str,
        prepare: Prepare[Model],
        purpose: Purpose = "answers",
        is_suitable: Callable[[Model], bool] = lambda _: True,
    ) -> AsyncGenerator[Model]:
        """The model, loaded as `prepare` says when it is not there yet, or does not suit; it stays while it is used."""
        while True:
            entry = self._entries.get((reference, purpose)) or self._start_loading(
                PooledModel(reference, purpose), prepare
            )
            if entry.users >= self._settings.slots + self._settings.queue:
                raise EngineBusy
            entry.users += 1
            self._stop_unload_timer(entry)
            entry.keep_alive = self._default_keep_alive
            entry.unload_when_idle = self._default_keep_alive == 0
            self._entries.move_to_end(entry.key)
            try:
                model = await asyncio.shield(entry.loading)
                if is_suitable(model):
                    yield model
                    return
                self._mark_outdated(entry)
            finally:
                entry.users -= 1
                await self._remove_if_unwanted(entry)
                self._start_unload_timer(entry)
                self._freed.set()

    async def set_keep_alive(self, reference: str, seconds: float | None) -> None:
        """How long a model stays after its last answer, unless it is used again. None: until its memory is needed."""
        if seconds == 0:
            await self.unload(reference)
            return
        for entry in self._entries.values():
            if entry.reference == reference:
                self._stop_unload_timer(entry)
                entry.keep_alive, entry.unload_when_idle = seconds, False
                self._start_unload_timer(entry)

    async def unload(self, reference: str) -> bool:
        """Let a model go, when its last answer is given; whether there was one."""
        entries = [entry for entry in self._all_entries() if entry.reference == reference]
        for entry in entries:
            entry.unload_when_idle = True
        for entry in entries:
            await asyncio.wait([entry.loading])
            await self._remove_if_unwanted(entry)
        return bool(entries)

    def _start_unload_timer(self, entry: PooledModel[Model]) -> None:
        if entry.keep_alive is not None and entry.is_idle and entry in self._all_entries():
            loop = asyncio.get_running_loop()
            entry.idle_since = now()
            entry.unload_timer = loop.call_later(
                min(entry.keep_alive, MAX_KEEP_ALIVE_SECONDS), self._on_unload_timer, entry
            )

    def _stop_unload_timer(self, entry: PooledModel[Model]) -> None:
        if entry.unload_timer is not None:
            entry.unload_timer.cancel()
            entry.unload_timer = None

    def _on_unload_timer(self, entry: PooledModel[Model]) -> None:
        entry.unload_timer = None
        entry.unload_when_idle = True
        task = asyncio.create_task(self._remove_if_unwanted(entry))
        self._unload_tasks.add(task)
        task.add_done_callback(self._unload_tasks.discard)

    def _all_entries(self) -> list[PooledModel[Model]]:
        return [*self._outdated, *self._entries.values()]

    def _start_loading(self, entry: PooledModel[Model], prepare: Prepare[Model]) -> PooledModel[Model]:
        self._entries[entry.key] = entry
        entry.loading = asyncio.create_task(self._load(entry, prepare))
        entry.loading.add_done_callback(lambda _: self._on_load_done(entry))
        self._notify_change()
        return entry

    def _on_load_done(self, entry: PooledModel[Model]) -> None:
        """A model that could not be loaded leaves no trace; whoever waited hears why."""
        if not entry.is_loaded:
            del self._entries[entry.key]
            self._notify_change()

    def _mark_outdated(self, entry: PooledModel[Model]) -> None:
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
            self._outdated.append(entry)
        entry.unload_when_idle = True

    async def _load(self, entry: PooledModel[Model], prepare: Prepare[Model]) -> Model:
        def on_progress(done: int, total: int) -> None:
            entry.fetched = done, total

        plan = await prepare(on_progress)
        entry.context = plan.context
        if plan.bytes > self._capacity:
            raise ModelTooLarge(
                f"{entry.reference} needs {plan.bytes // MB} MB ({plan.breakdown}), and engines.memory_mb allows "
                f"{self._capacity // MB} MB. Raise that, lower engines.context or engines.slots, or {plan.remedy}."
            )
        entry.phase = "waiting for room"
        await self._make_room(entry, plan.bytes)
        entry.phase, entry.memory_before = "loading", _process_memory()
        model = await asyncio.to_thread(plan.load)
        log.info("%s is loaded: %d MB", entry.reference, plan.bytes // MB)
        return model

    async def _make_room(self, entry: PooledModel[Model], needed: int) -> None:
        try:
            async with asyncio.timeout(MAKE_ROOM_TIMEOUT_SECONDS):
                while (
                    sum(other.bytes for other in self._all_entries()) + self._unloading_bytes + needed > self._capacity
                ):
                    idle = next((other for other in self._all_entries() if other.bytes and other.is_idle), None)
                    if idle is None:
                        self._freed.clear()
                        await self._freed.wait()
                    else:
                        await self._remove(idle)
                entry.bytes = needed
        except TimeoutError:
            raise EngineBusy(
                f"{entry.reference} needs {needed // MB} of the {self._capacity // MB} MB that engines.memory_mb "
                f"allows, and the models that take them were all in use for {MAKE_ROOM_TIMEOUT_SECONDS} seconds."
            ) from None

    async def _remove_if_unwanted(self, entry: PooledModel[Model]) -> None:
        if entry.unload_when_idle and entry.is_idle and entry in self._all_entries():
            await self._remove(entry)

    async def _remove(self, entry: PooledModel[Model]) -> None:
        self._stop_unload_timer(entry)
        if entry in self._outdated:
            self._outdated.remove(entry)
        else:
            del self._entries[entry.key]
        self._unloading_bytes += entry.bytes
        try:
            await asyncio.shield(asyncio.to_thread(entry.loading.result().close))
        finally:
            self._unloading_bytes -= entry.bytes
            self._freed.set()
        log.info("%s is unloaded", entry.reference)
        self._notify_change()

    def _notify_change(self) -> None:
        adapters = [name for entry in self.loaded() for name in entry.loading.result().adapters]
        self._on_change(list(dict.fromkeys([*(entry.reference for entry in self._entries.values()), *adapters])))


def _process_memory() -> int:
    return psutil.Process().memory_info().rss
