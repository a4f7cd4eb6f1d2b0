"""The circuit breaker, with two replicas that share it through the same tables."""

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
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.time = now()

    def __call__(self) -> datetime:
        return self.time

    def forward(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)


class Replicas:
    """Two replicas, a service that can be broken, and a clock."""

    def __init__(self, databases: list[Database], server: StubServer, service: Service) -> None:
        self.databases = databases
        self.server = server
        self.service = service
        self.clock = Clock()
        self.is_broken = False

    def handle(self, request: StubRequest) -> StubResponse:
        return text_response("down", 503) if self.is_broken else json_response({})

    async def call(self, replica: int = 0, times: int = 1) -> None:
        async with service_store.open_client(self.databases[replica], self.service, clock=self.clock) as client:
            for _ in range(times):
                await client.get("/")

    async def fail(self, times: int) -> None:
        self.is_broken = True
        for attempt in range(times):
            with pytest.raises(Unreachable):
                await self.call(attempt % 2)

    async def circuit(self) -> Circuit:
        async with self.databases[1].read_transaction() as session:
            return await session.get_one(Circuit, self.service.id)

    async def counts(self) -> tuple[str, int, int]:
        circuit = await self.circuit()
        return state_of(circuit, self.clock()), circuit.failure_count, circuit.success_count


@pytest.fixture
async def replicas(database: Database, add: Add) -> AsyncIterator[Replicas]:
    other = Database(get_settings().database_url)
    async with stub_server(lambda request: replicas.handle(request)) as server:
        replicas = Replicas([database, other], server, await add(server.url))
        yield replicas
    await other.close()


async def test_successful_calls_keep_the_circuit_closed(replicas: Replicas) -> None:
    await replicas.call(times=3)
    await replicas.call(1)
    assert await replicas.counts() == ("closed", 0, 4)


async def test_consecutive_failures_open_the_circuit_for_all_replicas(replicas: Replicas) -> None:
    await replicas.fail(THRESHOLD - 1)
    assert await replicas.counts() == ("closed", THRESHOLD - 1, 0)
    await replicas.fail(1)
    assert await replicas.counts() == ("open", THRESHOLD, 0)
    before = len(replicas.server.requests)
    for replica in (0, 1):
        with pytest.raises(
            CircuitOpen, match=r"failed 5 times in a row, and is not called for now: .*status 503"
        ) as refused:
            await replicas.call(replica)
        assert (refused.value.status, refused.value.retry_after) == (503, SECONDS)
    assert len(replicas.server.requests) == before


async def test_a_success_resets_the_failure_count(replicas: Replicas) -> None:
    await replicas.fail(THRESHOLD - 1)
    replicas.is_broken = False
    await replicas.call()
    await replicas.fail(THRESHOLD - 1)
    assert await replicas.counts() == ("closed", THRESHOLD - 1, 1)


async def test_a_404_response_is_no_failure(replicas: Replicas) -> None:
    replicas.handle = lambda request: StubResponse(b"", 404)
    for _ in range(THRESHOLD + 1):
        with pytest.raises(NotFoundInService):
            await replicas.call()
    assert await replicas.counts() == ("closed", 0, THRESHOLD + 1)


async def test_a_successful_trial_call_closes_the_circuit(replicas: Replicas) -> None:
    await replicas.fail(THRESHOLD)
    replicas.clock.forward(SECONDS - 1)
    with pytest.raises(CircuitOpen) as refused:
        await replicas.call()
    assert refused.value.retry_after == 1
    replicas.clock.forward(1)
    assert (await replicas.counts())[0] == "half_open"
    replicas.is_broken = False
    async with service_store.open_client(replicas.databases[0], replicas.service, clock=replicas.clock) as client:
        with pytest.raises(CircuitOpen):  # only one replica makes the trial call
            await replicas.call(1)
        await client.get("/")
    assert await replicas.counts() == ("closed", 0, 1)
    await replicas.call(1)


async def test_only_one_of_several_concurrent_calls_is_the_trial(replicas: Replicas) -> None:
    await replicas.fail(THRESHOLD)
    replicas.clock.forward(SECONDS)
    service, at = replicas.service, replicas.clock()
    calls = (circuit_breaker.before_call(replica, service.id, service.name, at) for replica in 4 * replicas.databases)
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results if result] == 7 * [CircuitOpen]


async def test_a_failed_trial_call_opens_the_circuit_again(replicas: Replicas) -> None:
    await replicas.fail(THRESHOLD)
    replicas.clock.forward(SECONDS)
    await replicas.fail(1)
    assert await replicas.counts() == ("open", THRESHOLD + 1, 0)
    with pytest.raises(CircuitOpen) as refused:
        await replicas.call(1)
    assert refused.value.retry_after == SECONDS


async def test_a_trial_call_that_never_ends_does_not_block_the_service_forever(replicas: Replicas) -> None:
    await replicas.fail(THRESHOLD)
    replicas.clock.forward(SECONDS)
    async with service_store.open_client(replicas.databases[0], replicas.service, clock=replicas.clock):
        pass  # makes no call, as if its process had died
    with pytest.raises(CircuitOpen):
        await replicas.call(1)
    replicas.clock.forward(SECONDS)
    replicas.is_broken = False
    await replicas.call(1)
    assert await replicas.counts() == ("closed", 0, 1)


async def test_a_failure_of_an_earlier_call_does_not_keep_the_circuit_open_longer(replicas: Replicas) -> None:
    async with service_store.open_client(replicas.databases[0], replicas.service, clock=replicas.clock) as earlier:
        await replicas.fail(THRESHOLD)
        replicas.clock.forward(SECONDS / 2)
        with pytest.raises(Unreachable):
            await earlier.get("/")
    replicas.clock.forward(SECONDS / 2)
    replicas.is_broken = False
    await replicas.call()
    assert (await replicas.counts())[0] == "closed"


async def test_failures_that_the_caller_handles_count_too(replicas: Replicas) -> None:
    replicas.is_broken = True
    async with service_store.open_client(replicas.databases[0], replicas.service, clock=replicas.clock) as client:
        for _ in range(THRESHOLD):
            with pytest.raises(Unreachable):
                await client.get("/")
    assert await replicas.counts() == ("open", THRESHOLD, 0)


async def test_the_failure_of_another_service_is_not_counted(replicas: Replicas, add: Add) -> None:
    async with stub_server(lambda request: text_response("down", 503)) as broken:
        other = await add(broken.url, "radarr")

        async def call_both() -> None:
            async with (
                service_store.open_client(replicas.databases[0], replicas.service, clock=replicas.clock) as working,
                service_store.open_client(replicas.databases[0], other, clock=replicas.clock) as failing,
            ):
                await working.get("/")
                await failing.get("/")

        with pytest.raises(Unreachable):
            await call_both()
    assert await replicas.counts() == ("closed", 0, 1)


async def test_a_changed_address_closes_the_circuit(replicas: Replicas) -> None:
    await replicas.fail(THRESHOLD)
    async with replicas.databases[0].transaction() as session:
        service = await service_store.get(session, replicas.service.id, lock=True)
        await service_store.change(session, service, {"url": "http://127.0.0.1:9"})
    assert await replicas.counts() == ("closed", 0, 0)


async def test_a_service_deleted_during_a_call_leaves_no_circuit(replicas: Replicas) -> None:
    database = replicas.databases[0]
    async with service_store.open_client(database, replicas.service, clock=replicas.clock) as client:
        await client.get("/")
        async with replicas.databases[1].transaction() as session:
            await service_store.delete(session, await service_store.get(session, replicas.service.id))
    async with database.read_transaction() as session:
        assert await session.get(Circuit, replicas.service.id) is None
