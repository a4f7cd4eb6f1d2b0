"""The events actor: delivery, missed messages, and a killed actor."""

import asyncio
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import actors, events
from cluster.errors import Unavailable
from cluster.events import LOST_CURSOR, Cursor, Events, Message
from cluster.settings import get_settings
from tests.support.waiting import TIMEOUT


def message(number: int) -> Message:
    return {"rooms": ["jobs"], "type": "test", "data": {"number": number}, "timestamp": "2026-01-01T00:00:00Z"}


def numbers(messages: list[Message]) -> list[int]:
    return [message["data"]["number"] for message in messages]


async def test_a_new_reader_gets_later_messages() -> None:
    actor = Events()
    await actor.publish([message(1)])
    start = await actor.poll(None, seconds=0)
    await actor.publish([message(2), message(3)])
    batch = await actor.poll(start.cursor, seconds=0)
    assert (start.messages, numbers(batch.messages), batch.missed) == ([], [2, 3], False)


async def test_a_reader_waits_for_the_next_message() -> None:
    actor = Events()
    cursor = (await actor.poll(None, seconds=0)).cursor
    waiting = asyncio.create_task(actor.poll(cursor, seconds=10))
    await asyncio.sleep(0)
    await actor.publish([message(1)])
    assert numbers((await waiting).messages) == [1]


async def test_a_poll_without_messages_ends_in_time_and_keeps_its_cursor() -> None:
    actor = Events()
    cursor = (await actor.poll(None, seconds=0)).cursor
    batch = await actor.poll(cursor, seconds=0.01)
    assert (batch.messages, batch.cursor, batch.missed) == ([], cursor, False)


async def test_every_reader_gets_all_messages_in_order() -> None:
    actor = Events()
    cursors = [(await actor.poll(None, seconds=0)).cursor for _ in range(3)]
    for number in range(2500):
        await actor.publish([message(number)])
    for cursor in cursors:
        received: list[int] = []
        while len(received) < 2500:
            batch = await actor.poll(cursor, seconds=0)
            assert 0 < len(batch.messages) <= events.MAX_BATCH_MESSAGES
            received, cursor = received + numbers(batch.messages), batch.cursor
        assert received == list(range(2500))


async def test_a_slow_reader_learns_that_it_missed_messages() -> None:
    actor = Events()
    cursor = (await actor.poll(None, seconds=0)).cursor
    await actor.publish([message(number) for number in range(events.MAX_BUFFERED_MESSAGES + 5)])
    batch = await actor.poll(cursor, seconds=0)
    assert batch.missed
    assert numbers(batch.messages)[0] == 5
    assert not (await actor.poll(batch.cursor, seconds=0)).missed


async def test_large_messages_do_not_fill_the_memory_of_the_actor() -> None:
    actor = Events()
    cursor = (await actor.poll(None, seconds=0)).cursor
    size = events.MAX_BUFFERED_BYTES // 4
    for number in range(9):
        large = message(number)
        large["data"]["text"] = "x" * size
        await actor.publish([large])
    batch = await actor.poll(cursor, seconds=0)
    assert batch.missed
    assert numbers(batch.messages) == [6, 7, 8]
    too_large = message(9)
    too_large["data"]["text"] = "x" * (events.MAX_BUFFERED_BYTES + 1)
    await actor.publish([too_large])
    await actor.publish([message(10)])
    after = await actor.poll(batch.cursor, seconds=0)
    assert (after.missed, numbers(after.messages)) == (True, [10])


@pytest.mark.parametrize("cursor", [LOST_CURSOR, Cursor("another life", 7)])
async def test_a_cursor_of_an_earlier_actor_counts_as_missed_messages(cursor: Cursor) -> None:
    actor = Events()
    await actor.publish([message(1)])
    batch = await actor.poll(cursor, seconds=0)
    assert batch.missed
    assert numbers(batch.messages) == [1]


async def test_publishing_without_ray_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_no_lookup_before", 0.0)
    events.publish([message(1)])
    with pytest.raises(Unavailable):
        await events.poll(None)


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A small Ray cluster on loopback."""
    import ray

    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray sets an unset mode to "token" for this process, and platforms of later tests would inherit that.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(events, "_no_lookup_before", 0.0)
    with tempfile.TemporaryDirectory(prefix="fgr-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(
            num_cpus=1,
            include_dashboard=False,
            object_store_memory=80_000_000,
            namespace=get_settings().ray_namespace,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
            runtime_env={"env_vars": {"PYTHONPATH": str(Path(events.__file__).parents[1])}},
        )
        yield ray
        ray.shutdown()
        actors.forget_actor(events.ACTOR_NAME)


@pytest.mark.platform
async def test_readers_and_writers_continue_after_a_kill_of_the_actor(ray_cluster: Any) -> None:
    options = {"name": events.ACTOR_NAME, "lifetime": "detached", "max_restarts": -1, "max_concurrency": 1000}
    actor = ray_cluster.remote(Events).options(num_cpus=0, **options).remote()
    cursor = (await events.poll(None)).cursor
    events.publish([message(1)])
    before = await events.poll(cursor)
    assert numbers(before.messages) == [1]
    await events.share_counts("a", {"x": 1.0})
    assert await events.shared_counts() == {"a": {"x": 1.0}}

    os.kill(await actor.__ray_call__.remote(_process_of), signal.SIGKILL)
    after = await _first_batch(before.cursor)
    assert after.missed
    assert set(numbers(after.messages)) == {2}


def _process_of(_: object) -> int:
    return os.getpid()


async def _first_batch(cursor: Cursor) -> events.Batch:
    """Publish until a message arrives. Messages to the dying actor may be lost."""
    async with asyncio.timeout(TIMEOUT):
        while True:
            events.publish([message(2)])
            try:
                batch = await events.poll(cursor, seconds=0.1)
            except Unavailable:
                continue
            if batch.messages:
                return batch
