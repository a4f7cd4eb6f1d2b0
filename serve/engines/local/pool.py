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
from cluster.times import seconds_of
from pipelines.training.models.registry import OnProgress
from serve.engines.protocol import EngineBusy, Loading, ModelTooLarge, Phase

log = logging.getLogger(__name__)

ROOM_SECONDS = 120
LONGEST_SECONDS = 10 * 365 * 86_400.0
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
class Plan(Generic[Model]):
    """A model that could be loaded: what it needs, and how it is done."""

    bytes: int
    parts: str  # what needs them, in words
    remedy: str  # what would make it need less
    context: int
    load: Callable[[], Model]  # takes a while, and so has a thread of its own


Prepare = Callable[[OnProgress], Awaitable[Plan[Model]]]


@dataclass(eq=False)
class Entry(Generic[Model]):
    reference: str
    purpose: Purpose
    loading: asyncio.Task[Model] = field(init=False)
    phase: Phase = "fetching"
    fetched: tuple[int, int] | None = None  # bytes of how many
    asked_at: float = field(default_factory=monotonic)
    users: int = 0
    bytes: int = 0  # reserved as soon as there is room for it
    memory_before: int = 0  # of the process, when it began to load
    context: int = 0
    unwanted: bool = False  # to be unloaded as soon as nobody uses it
    keep: float | None = None  # seconds that it stays after its last answer; None: until its memory is needed
    leaving: asyncio.TimerHandle | None = None  # while nobody uses it and its time runs
    idle_since: datetime = field(default_factory=now)

    @property
    def key(self) -> tuple[str, Purpose]:
        return self.reference, self.purpose

    @property
    def is_loaded(self) -> bool:
        return self.loading.done() and not self.loading.cancelled() and self.loading.exception() is None

    @property
    def leaves_at(self) -> datetime | None:
        if self.keep is None:
            return None
        return (self.idle_since if self.leaving else now()) + timedelta(seconds=min(self.keep, LONGEST_SECONDS))

    @property
    def progress(self) -> float | None:
        """Which part of its phase is done."""
        if self.phase == "fetching" and self.fetched is not None:
            return self.fetched[0] / self.fetched[1]
        if self.phase == "loading":  # llama.cpp does not tell; what the process has taken since then does, nearly
            return min(max(_memory() - self.memory_before, 0) / self.bytes, 1.0)
        return None

    @property
    def is_idle(self) -> bool:
        return self.is_loaded and not self.users


class Shelf(Generic[Model]):
    def __init__(
        self, capacity: int, settings: EngineSettings, on_change: Callable[[list[str]], None] = lambda _: None
    ) -> None:
        self._capacity = capacity
        self._settings = settings
        self._on_change = on_change
        self._entries = OrderedDict[tuple[str, Purpose], Entry[Model]]()  # the most recently used last
        self._outdated: list[Entry[Model]] = []  # others have taken their place; they leave after their last answer
        self._leaving = 0  # bytes of models that are being unloaded
        self._freed = asyncio.Event()  # set whenever there may be more room
        self._keep = None if settings.keep_alive is None else seconds_of(settings.keep_alive)
        self._ending = set[asyncio.Task[None]]()  # asyncio itself would forget them

    def loaded(self) -> list[Entry[Model]]:
        return [entry for entry in self._all() if entry.is_loaded]

    def loading(self) -> list[Loading]:
        return [
            Loading(entry.reference, entry.phase, entry.progress, entry.bytes or None, monotonic() - entry.asked_at)
            for entry in self._all()
            if not entry.loading.done()
        ]

    @asynccontextmanager
    async def use(
        self,
        reference: str,
        prepare: Prepare[Model],
        purpose: Purpose = "answers",
        suits: Callable[[Model], bool] = lambda _: True,
    ) -> AsyncGenerator[Model]:
        """The model, loaded as `prepare` says when it is not there yet, or does not suit; it stays while it is used."""
        while True:
            entry = self._entries.get((reference, purpose)) or self._begin(Entry(reference, purpose), prepare)
            if entry.users >= self._settings.slots + self._settings.queue:
                raise EngineBusy
            entry.users += 1
            self._stop_clock(entry)
            entry.keep = self._keep
            entry.unwanted = self._keep == 0
            self._entries.move_to_end(entry.key)
            try:
                model = await asyncio.shield(entry.loading)
                if suits(model):
                    yield model
                    return
                self._outdate(entry)
            finally:
                entry.users -= 1
                await self._remove_if_unwanted(entry)
                self._start_clock(entry)
                self._freed.set()

    async def keep(self, reference: str, seconds: float | None) -> None:
        """How long a model stays after its last answer, unless it is used again. None: until its memory is needed."""
        if seconds == 0:
            await self.unload(reference)
            return
        for entry in self._entries.values():
            if entry.reference == reference:
                self._stop_clock(entry)
                entry.keep, entry.unwanted = seconds, False
                self._start_clock(entry)

    async def unload(self, reference: str) -> bool:
        """Let a model go, when its last answer is given; whether there was one."""
        entries = [entry for entry in self._all() if entry.reference == reference]
        for entry in entries:
            entry.unwanted = True
        for entry in entries:
            await asyncio.wait([entry.loading])
            await self._remove_if_unwanted(entry)
        return bool(entries)

    def _start_clock(self, entry: Entry[Model]) -> None:
        if entry.keep is not None and entry.is_idle and entry in self._all():
            loop = asyncio.get_running_loop()
            entry.idle_since = now()
            entry.leaving = loop.call_later(min(entry.keep, LONGEST_SECONDS), self._end, entry)

    def _stop_clock(self, entry: Entry[Model]) -> None:
        if entry.leaving is not None:
            entry.leaving.cancel()
            entry.leaving = None

    def _end(self, entry: Entry[Model]) -> None:
        entry.leaving = None
        entry.unwanted = True
        ending = asyncio.create_task(self._remove_if_unwanted(entry))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    def _all(self) -> list[Entry[Model]]:
        return [*self._outdated, *self._entries.values()]

    def _begin(self, entry: Entry[Model], prepare: Prepare[Model]) -> Entry[Model]:
        self._entries[entry.key] = entry
        entry.loading = asyncio.create_task(self._load(entry, prepare))
        entry.loading.add_done_callback(lambda _: self._settle(entry))
        self._tell()
        return entry

    def _settle(self, entry: Entry[Model]) -> None:
        """A model that could not be loaded leaves no trace; whoever waited hears why."""
        if not entry.is_loaded:
            del self._entries[entry.key]
            self._tell()

    def _outdate(self, entry: Entry[Model]) -> None:
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
            self._outdated.append(entry)
        entry.unwanted = True

    async def _load(self, entry: Entry[Model], prepare: Prepare[Model]) -> Model:
        def tell(done: int, total: int) -> None:
            entry.fetched = done, total

        plan = await prepare(tell)
        entry.context = plan.context
        if plan.bytes > self._capacity:
            raise ModelTooLarge(
                f"{entry.reference} needs {plan.bytes // MB} MB ({plan.parts}), and engines.memory_mb allows "
                f"{self._capacity // MB} MB. Raise that, lower engines.context or engines.slots, or {plan.remedy}."
            )
        entry.phase = "waiting for room"
        await self._make_room(entry, plan.bytes)
        entry.phase, entry.memory_before = "loading", _memory()
        model = await asyncio.to_thread(plan.load)
        log.info("%s is loaded: %d MB", entry.reference, plan.bytes // MB)
        return model

    async def _make_room(self, entry: Entry[Model], needed: int) -> None:
        try:
            async with asyncio.timeout(ROOM_SECONDS):
                while sum(other.bytes for other in self._all()) + self._leaving + needed > self._capacity:
                    idle = next((other for other in self._all() if other.bytes and other.is_idle), None)
                    if idle is None:
                        self._freed.clear()
                        await self._freed.wait()
                    else:
                        await self._remove(idle)
                entry.bytes = needed
        except TimeoutError:
            raise EngineBusy(
                f"{entry.reference} needs {needed // MB} of the {self._capacity // MB} MB that engines.memory_mb "
                f"allows, and the models that take them were all in use for {ROOM_SECONDS} seconds."
            ) from None

    async def _remove_if_unwanted(self, entry: Entry[Model]) -> None:
        if entry.unwanted and entry.is_idle and entry in self._all():
            await self._remove(entry)

    async def _remove(self, entry: Entry[Model]) -> None:
        self._stop_clock(entry)
        if entry in self._outdated:
            self._outdated.remove(entry)
        else:
            del self._entries[entry.key]
        self._leaving += entry.bytes
        try:
            await asyncio.shield(asyncio.to_thread(entry.loading.result().close))
        finally:
            self._leaving -= entry.bytes
            self._freed.set()
        log.info("%s is unloaded", entry.reference)
        self._tell()

    def _tell(self) -> None:
        adapters = [name for entry in self.loaded() for name in entry.loading.result().adapters]
        self._on_change(list(dict.fromkeys([*(entry.reference for entry in self._entries.values()), *adapters])))


def _memory() -> int:
    return psutil.Process().memory_info().rss
