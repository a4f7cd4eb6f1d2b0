"""The monitor: sources at their own pace, their errors and their age."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest

from cluster.errors import Unavailable
from cluster.servers import monitor as server_monitor
from cluster.servers.monitor import ServerMonitor
from cluster.servers.sources import Source, configured_sources
from cluster.servers.states import Reading, SourceReading, server_state
from cluster.services.capabilities.server_values import Cpu, Memory, ServerValues
from cluster.settings import DeclaredServer, ServerSettings, load_settings
from tests.support.waiting import TIMEOUT

BUSY = ServerValues(cpu=Cpu(usage_percent=90.0, cores=2), uptime_seconds=5.0)
IDLE = ServerValues(
    cpu=Cpu(usage_percent=1.0, cores=2),
    memory=Memory(used_gb=1.0, total_gb=2.0, usage_percent=50.0, available_gb=1.0),
)


def answers(values: ServerValues) -> Callable[[], Awaitable[ServerValues]]:
    async def read() -> ServerValues:
        return values

    return read


async def hang() -> ServerValues:
    await asyncio.Event().wait()
    raise AssertionError


async def fail() -> ServerValues:
    raise Unavailable("The service does not answer.")


async def stop(reading: asyncio.Task[None]) -> None:
    reading.cancel()
    with suppress(asyncio.CancelledError):
        await reading


async def test_a_source_that_hangs_delays_no_other() -> None:
    sources = {"a": {"good": Source(answers(IDLE), 0.01), "bad": Source(hang, 0.01)}, "b": {"bad": Source(hang, 0.01)}}
    monitor = ServerMonitor(sources)
    reading = asyncio.create_task(monitor.read_forever())
    snapshot = monitor.snapshot()
    for _ in range(5):
        before, snapshot = snapshot, await monitor.wait_for_change(snapshot.version, TIMEOUT)
        assert snapshot.version > before.version
    await stop(reading)
    assert snapshot.servers["a"].server_status.status == "warning"
    assert snapshot.servers["a"].values.memory == IDLE.memory
    assert snapshot.servers["a"].sources["bad"].status == "pending"
    assert snapshot.servers["b"].server_status.status == "error"


async def test_a_source_that_does_not_answer_in_time_has_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_monitor, "READ_SECONDS", 0.01)
    snapshot = await ServerMonitor({"a": {"bad": Source(hang, 1)}}).read_all()
    assert snapshot.servers["a"].sources["bad"].error == "It did not answer within 0 s."


async def test_an_error_is_told_and_the_last_values_stay() -> None:
    values: list[Callable[[], Awaitable[ServerValues]]] = [answers(BUSY), fail]

    async def read() -> ServerValues:
        return await values.pop(0)()

    monitor = ServerMonitor({"a": {"service": Source(read, 1)}})
    assert (await monitor.read_all()).servers["a"].server_status.status == "online"
    server = (await monitor.read_all()).servers["a"]
    assert server.values.cpu == BUSY.cpu
    assert (server.sources["service"].status, server.sources["service"].error) == (
        "error",
        "The service does not answer.",
    )
    assert server.server_status.status == "warning"


async def test_an_error_of_the_program_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def read() -> ServerValues:
        raise ValueError("token=abc12345678")

    snapshot = await ServerMonitor({"a": {"broken": Source(read, 1), "good": Source(answers(IDLE), 1)}}).read_all()
    error = snapshot.servers["a"].sources["broken"].error
    assert error is not None
    assert error.startswith("ValueError")
    assert "abc12345678" not in error
    assert "cannot be read: broken of a" in caplog.text


def test_values_that_are_older_than_three_periods_are_marked() -> None:
    reading = Reading(IDLE, read_at=100.0, wall_time=server_monitor.now(), seconds=0.02)
    source = SourceReading(period_seconds=10, reading=reading)
    assert server_state({"x": source}, 129.0).sources["x"].status == "ok"
    late = server_state({"x": source}, 131.0)
    assert (late.sources["x"].status, late.sources["x"].age_s) == ("stale", 31.0)
    assert late.server_status.status == "offline"
    assert late.values.memory == IDLE.memory


def test_the_first_source_counts_and_others_complete_it() -> None:
    reading = Reading(BUSY, 100.0, server_monitor.now(), 0.01)
    sources = {
        "first": SourceReading(1, reading),
        "second": SourceReading(1, reading._replace(values=IDLE, seconds=0.05)),
    }
    state = server_state(sources, 100.0)
    assert (state.values.cpu, state.values.memory) == (BUSY.cpu, IDLE.memory)
    assert (state.server_status.uptime_seconds, state.server_status.response_time_ms) == (5.0, 50.0)


def test_without_settings_this_machine_is_the_ai_server(home: object) -> None:
    sources = configured_sources(load_settings().settings.servers)
    assert {name: list(of_server) for name, of_server in sources.items()} == {"ai_server": ["this_machine"]}


@pytest.mark.parametrize(
    ("server", "reason"),
    [
        ({}, "has no source"),
        ({"services": ["nas"], "file_systems": ["/mnt"]}, "those of this_machine"),
        ({"this_machine": True, "file_systems": ["mnt"]}, "String should match pattern"),
    ],
)
def test_a_server_without_a_source_is_refused(server: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        DeclaredServer.model_validate(server)


@pytest.mark.parametrize("name", ["overview", "total_servers", "Nas", "a b"])
def test_a_name_that_means_something_else_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"no server may be named|should match pattern"):
        ServerSettings.model_validate({"declared": {name: {"this_machine": True}}, "period_seconds": 1})
