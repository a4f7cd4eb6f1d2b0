"""Transient errors of the database, and the callbacks before and after a commit."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import InternalError, OperationalError, SQLAlchemyError

from cluster import db
from cluster.db import Database, after_commit, before_commit, is_transient, run_with_database
from cluster.settings import get_settings

pytestmark = pytest.mark.both_databases


async def test_an_unreachable_server_is_a_transient_error() -> None:
    database = Database("postgresql+asyncpg://nobody@127.0.0.1:1/nothing")
    for begin in (database.transaction, database.read_transaction):
        with pytest.raises(OperationalError) as refused:
            async with begin():
                raise AssertionError("there is nothing to connect to")
        assert is_transient(refused.value)
    await database.close()


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
async def test_an_invalid_value_is_no_transient_error(database: Database) -> None:
    for value, type_ in (("\ud800", "text"), ("\0", "text"), ("no number", "integer"), (2**70, "bigint")):
        with pytest.raises(SQLAlchemyError) as refused:
            async with database.transaction() as session:
                await session.execute(text(f"SELECT CAST(:value AS {type_})"), {"value": value})
        assert not is_transient(refused.value)


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
async def test_an_internal_error_of_the_driver_is_transient(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncpg raises it when a connection breaks. The statement is not the cause."""

    async def fail(*_: object, **__: object) -> None:
        raise asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress")

    async with database.read_transaction() as session:
        await session.execute(text("SELECT 1"))
        with monkeypatch.context() as patch:
            patch.setattr(asyncpg.Connection, "prepare", fail)
            with pytest.raises(InternalError) as refused:
                await session.execute(text("SELECT 2"))
    assert is_transient(refused.value)


async def test_a_rollback_runs_no_callbacks(database: Database) -> None:
    calls: list[str] = []

    async def before() -> None:
        calls.append("last")

    async with database.transaction() as session:
        after_commit(session, lambda: calls.append("committed"))
        before_commit(session, before)
        calls.append("work")
    assert calls == ["work", "last", "committed"]
    with pytest.raises(ZeroDivisionError):
        await _fail(database, calls)
    assert calls == ["work", "last", "committed"]


# SQLite's lock belongs to the process, which the operating system thaws or ends.
@pytest.mark.parametrize("database", ["postgres"], indirect=True)
async def test_a_frozen_process_does_not_keep_its_locks(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(db, "MAX_IDLE_TRANSACTION_SECONDS", 1)
    frozen = Database(get_settings().database_url)
    lock = text("LOCK TABLE leadership IN ACCESS EXCLUSIVE MODE")

    async def freeze() -> None:
        async with frozen.transaction() as session:
            await session.execute(lock)
            async with database.transaction() as other:
                await other.execute(lock)  # waits until the server has ended the first transaction
            await session.execute(text("SELECT 1"))

    with pytest.raises(SQLAlchemyError) as ended:
        await freeze()
    assert is_transient(ended.value)
    await frozen.close()


# Only PostgreSQL limits the number of connections.
@pytest.mark.parametrize("database", ["postgres"], indirect=True)
async def test_threads_share_one_pool_of_connections(database: Database) -> None:
    threads = 40
    barrier = Barrier(threads)
    connections = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"

    async def count(shared: Database) -> int:
        async with shared.read_transaction() as session:
            return await session.scalar(text(connections)) or 0

    def work(_: int) -> int:
        barrier.wait()
        return max(run_with_database(count) for _ in range(5))

    with ThreadPoolExecutor(threads) as executor:
        counts = await asyncio.to_thread(lambda: list(executor.map(work, range(threads))))
    assert len(counts) == threads
    assert max(counts) <= 10


async def test_work_in_a_thread_leaves_no_task_behind(database: Database) -> None:
    ends: list[str] = []

    async def linger() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ends.append("cancelled")

    async def fail(_: Database) -> None:
        task = asyncio.create_task(linger())
        await asyncio.sleep(0)
        raise SystemError(task.get_name())

    with pytest.raises(SystemError):
        await asyncio.to_thread(run_with_database, fail)
    assert ends == ["cancelled"]


async def _fail(database: Database, calls: list[str]) -> None:
    async with database.transaction() as session:
        after_commit(session, lambda: calls.append("never"))
        _ = 1 / 0
