"""The slots of a model, shared fairly between accounts."""

import asyncio
from contextlib import suppress

import pytest

from serve.engines.local.slots import FairSlots


class Requests:
    """Requests for the slots of a model. Each keeps its slot until the test ends it."""

    def __init__(self, count: int) -> None:
        self.slots = FairSlots(count)
        self.running: list[str] = []  # in the order in which they got their slots
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def add(self, *names: str) -> None:
        """The first letter of a name is the account."""
        for name in names:
            self._ends[name] = asyncio.Event()
            self._tasks[name] = asyncio.create_task(self._run(name))
        await _settle()

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await _settle()

    async def cancel(self, *names: str) -> None:
        for name in names:
            self._tasks[name].cancel()
        await _settle()

    async def _run(self, name: str) -> None:
        async with self.slots.take(name[0]):
            self.running.append(name)
            with suppress(asyncio.CancelledError):
                await self._ends[name].wait()


async def _settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_one_account_may_have_all_slots() -> None:
    requests = Requests(2)
    await requests.add("a1", "a2", "a3")
    assert requests.running == ["a1", "a2"]
    await requests.end("a2")
    assert requests.running == ["a1", "a2", "a3"]


async def test_the_next_slot_goes_to_whoever_has_none() -> None:
    requests = Requests(2)
    await requests.add(*(f"a{number}" for number in range(9)), "b1", "c1")
    for name in ("a0", "a1"):
        await requests.end(name)
    assert requests.running == ["a0", "a1", "b1", "c1"]


async def test_accounts_take_turns() -> None:
    requests = Requests(1)
    await requests.add("a1", "a2", "a3", "b1", "b2", "b3")
    for name in ("a1", "b1", "a2", "b2", "a3"):
        await requests.end(name)
    assert requests.running == ["a1", "b1", "a2", "b2", "a3", "b3"]


async def test_an_account_gets_no_more_than_its_share_of_several_slots() -> None:
    requests = Requests(4)
    await requests.add(*(f"a{number}" for number in range(9)), *(f"b{number}" for number in range(9)))
    for name in ("a0", "a1", "a2", "a3"):
        await requests.end(name)
    assert sorted(name[0] for name in requests.running[4:]) == ["a", "a", "b", "b"]


async def test_a_request_that_is_cancelled_while_it_waits_takes_no_slot() -> None:
    requests = Requests(1)
    await requests.add("a1", "b1", "b2", "c1")
    await requests.cancel("b1", "b2")
    await requests.end("a1")
    assert requests.running == ["a1", "c1"]
    await requests.end("c1")
    await requests.add("d1")
    assert requests.running == ["a1", "c1", "d1"]


async def test_a_request_that_is_cancelled_just_as_it_gets_a_slot_gives_it_back() -> None:
    slots = FairSlots(1)
    first = slots.take("a")
    await first.__aenter__()
    waiting = asyncio.ensure_future(slots.take("b").__aenter__())
    await _settle()
    await first.__aexit__(None, None, None)  # gives it to the waiting one, which has not run since
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    async with asyncio.timeout(5), slots.take("c"):
        pass
