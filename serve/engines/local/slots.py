"""The slots of a model, shared fairly between accounts."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from itertools import count


class FairSlots:
    """A semaphore whose next free slot goes to the account that has the fewest slots.

    Among several it goes to the one whose last turn was the longest ago, and within an account to the oldest request.
    So an account that sends thousands of requests delays another one by one answer at most.
    """

    def __init__(self, slots: int) -> None:
        self._free = slots
        self._taken = Counter[str]()  # slots by account
        self._turns = count(1)
        self._last_turn = Counter[str]()  # by account
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # by account

    @asynccontextmanager
    async def take(self, account: str) -> AsyncGenerator[None]:
        if self._free:
            self._free -= 1
            self._grant(account)
        else:
            await self._wait(account)
        try:
            yield
        finally:
            self._release(account)

    async def _wait(self, account: str) -> None:
        slot = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(account, deque()).append(slot)
        try:
            await slot
        except asyncio.CancelledError:
            if not slot.cancelled():  # it was given the slot just before
                self._release(account)
            raise

    def _release(self, account: str) -> None:
        self._taken[account] -= 1
        while self._waiting:
            next_account = min(self._waiting, key=lambda name: (self._taken[name], self._last_turn[name]))
            requests = self._waiting[next_account]
            slot = requests.popleft()
            if not requests:
                del self._waiting[next_account]
            if not slot.cancelled():
                self._grant(next_account)
                slot.set_result(None)
                return
        self._free += 1

    def _grant(self, account: str) -> None:
        self._taken[account] += 1
        self._last_turn[account] = next(self._turns)
