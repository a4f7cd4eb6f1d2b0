"""The circuit breaker, as two replicas see it: each has a database of its own over the same tables."""

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime, timedelta

import pytest

from cluster.db import Database, now
from cluster.services import circuit_breaker
from cluster.services import store as service_store
from cluster.services.circuit_breaker import Circuit, state_of
from cluster.services.errors import CircuitOpen, NotFoundInService, Unreachable
from cluster.services.store import Service
from cluster.settings import get_settings
from tests.cluster.services.conftest import Add
from tests.support.services.stub_server import (
    StubRequest,
    StubResponse,
    StubServer,
    json_response,
    stub_server,
    text_response,
)

THRESHOLD = 5
SECONDS = 60


class Clock:
    """It goes when it is told to."""

    def __init__(self) -> None:
        self.time = now()

    def __call__(self) -> datetime:
        return self.time

    def forward(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)


class Replicas:
    """Two replicas, a service that works or does not, and a clock."""

    def __init__(self, databases: list[Database], server: StubServer, service: Service) -> None:
        self.databases = databases
        self.server = server
        self.service = service
        self.clock = Clock()
        self.is_broken = False

    def answer(self, request: StubRequest) -> StubResponse:
        return text_response("down", 503) if self.is_broken else json_response({})

    async def ask(self, replica: int = 0, times: int = 1) -> None:
        async with service_store.open_client(self.databases[replica], self.service, clock=self.clock) as client:
            for _ in range(times):
                await client.get("/")

    async def fail(self, times: int) -> None:
        self.is_broken = True
        for turn in range(times):
            with pytest.raises(Unreachable):
                await self.ask(turn % 2)

    async def circuit(self) -> Circuit:
        async with self.databases[1].read_transaction() as session:
            return await session.get_one(Circuit, self.service.id)

    async def counts(self) -> tuple[str, int, int]:
        circuit = await self.circuit()
        return state_of(circuit, self.clock()), circuit.failure_count, circuit.success_count


@pytest.fixture
async def replicas(database: Database, add: Add) -> AsyncIterator[Replicas]:
    other = Database(get_settings().database_url)
    async with stub_server(lambda request: replicas.answer(request)) as server:
        replicas = Replicas([database, other], server, await add(server.url))
        yield replicas
    await other.close()


async def test_all_is_well(replicas: Replicas) -> None:
    await replicas.ask(times=3)
    await replicas.ask(1)
    assert await replicas.counts() == ("closed", 0, 4)


async def test_failures_in_a_row_open_it_for_all_replicas(replicas: Replicas) -> None:
    await replicas.fail(THRESHOLD - 1)
    assert await replicas.counts() == ("closed", THRESHOLD - 1, 0)
    await replicas.fail(1)
    assert await replicas.counts() == ("open", THRESHOLD, 0)
    before = len(replicas.server.requests)
    for replica in (0, 1):
        with pytest.raises(
            CircuitOpen, match=r"failed 5 times in a row, and is not called for now: .*status 503"
        ) as refused:
            await replicas.ask(replica)
        assert (refused.value.status, refused.value.retry_after) == (503, SECONDS)
    assert len(replicas.server.requests) == before


async def test_a_success_in_between_starts_the_count_anew(replicas: Replicas) -> None:
    await replicas.fail(THRESHOLD - 1)
    replicas.is_broken = False
    await replicas.ask()
    await replicas.fail(THRESHOLD - 1)
    assert await replicas.counts() == ("closed", THRESHOLD - 1, 1)


async def test_that_a_service_says_no_is_no_failure(replicas: Replicas) -> None:
    replicas.answer = lambda request: StubResponse(b"", 404)
    for _ in range(THRESHOLD + 1):
        with pytest.raises(NotFoundInService):
            await replicas.ask()
    assert await replicas.counts() == ("closed", 0, THRESHOLD + 1)


async def test_when_the_time_is_up_one_tries_and_closes_it(replicas: Replicas) -> None:
    await replicas.fail(THRESHOLD)
    replicas.clock.forward(SECONDS - 1)
    with pytest.raises(CircuitOpen) as refused:
        await replicas.ask()
    assert refused.value.retry_after == 1
    replicas.clock.forward(1)
    assert (await replicas.counts())[0] == "half_open"
    replicas.is_broken = False
    async with service_store.open_client(replicas.databases[0], replicas.service, clock=replicas.clock) as client:
        with pytest.raises(CircuitOpen):  # the other replica is not the one who tries
            await replicas.ask(1)
        await client.get("/")
    assert await replicas.counts() == ("closed", 0, 1)
    await replicas.ask(1)


async def test_of_all_who_find_its_time_up_at_once_one_tries(replicas: Replicas) -> None:
    await replicas.fail(THRESHOLD)
    replicas.clock.forward(SECONDS)
    service, at = replicas.service, replicas.clock()
    entering = (
        circuit_breaker.before_call(replica, service.id, service.name, at) for replica in 4 * replicas.databases
    )
    outcomes = await asyncio.gather(*entering, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes if outcome] == 7 * [CircuitOpen]


async def test_when_the_trial_fails_it_is_left_alone_again(replicas: Replicas) -> None:
    await replicas.fail(THRESHOLD)
    replicas.clock.forward(SECONDS)
    await replicas.fail(1)
    assert await replicas.counts() == ("open", THRESHOLD + 1, 0)
    with pytest.raises(CircuitOpen) as refused:
        await replicas.ask(1)
    assert refused.value.retry_after == SECONDS


async def test_a_trial_that_is_never_heard_of_again_does_not_block_it_forever(replicas: Replicas) -> None:
    await replicas.fail(THRESHOLD)
    replicas.clock.forward(SECONDS)
    async with service_store.open_client(replicas.databases[0], replicas.service, clock=replicas.clock):
        pass  # as if its process had died: it has asked nothing
    with pytest.raises(CircuitOpen):
        await replicas.ask(1)
    replicas.clock.forward(SECONDS)
    replicas.is_broken = False
    await replicas.ask(1)
    assert await replicas.counts() == ("closed", 0, 1)


async def test_who_began_before_it_opened_does_not_keep_it_open_longer(replicas: Replicas) -> None:
    async with service_store.open_client(replicas.databases[0], replicas.service, clock=replicas.clock) as late:
        await replicas.fail(THRESHOLD)
        replicas.clock.forward(SECONDS / 2)
        with pytest.raises(Unreachable):
            await late.get("/")
    replicas.clock.forward(SECONDS / 2)
    replicas.is_broken = False
    await replicas.ask()
    assert (await replicas.counts())[0] == "closed"


async def test_what_is_failed_and_caught_inside_counts_too(replicas: Replicas) -> None:
    replicas.is_broken = True
    async with service_store.open_client(replicas.databases[0], replicas.service, clock=replicas.clock) as client:
        for _ in range(THRESHOLD):
            with pytest.raises(Unreachable):
                await client.get("/")
    assert await replicas.counts() == ("open", THRESHOLD, 0)


async def test_the_failure_of_another_service_is_not_ones_own(replicas: Replicas, add: Add) -> None:
    async with stub_server(lambda request: text_response("down", 503)) as broken:
        other = await add(broken.url, "radarr")

        async def ask_both() -> None:
            async with (
                service_store.open_client(replicas.databases[0], replicas.service, clock=replicas.clock) as fine,
                service_store.open_client(replicas.databases[0], other, clock=replicas.clock) as failing,
            ):
                await fine.get("/")
                await failing.get("/")

        with pytest.raises(Unreachable):
            await ask_both()
    assert await replicas.counts() == ("closed", 0, 1)


async def test_another_address_is_another_chance(replicas: Replicas) -> None:
    await replicas.fail(THRESHOLD)
    async with replicas.databases[0].transaction() as session:
        service = await service_store.get(session, replicas.service.id, lock=True)
        await service_store.change(session, service, {"url": "http://127.0.0.1:9"})
    assert await replicas.counts() == ("closed", 0, 0)


async def test_a_service_that_is_deleted_meanwhile_leaves_nothing(replicas: Replicas) -> None:
    database = replicas.databases[0]
    async with service_store.open_client(database, replicas.service, clock=replicas.clock) as client:
        await client.get("/")
        async with replicas.databases[1].transaction() as session:
            await service_store.delete(session, await service_store.get(session, replicas.service.id))
    async with database.read_transaction() as session:
        assert await session.get(Circuit, replicas.service.id) is None
