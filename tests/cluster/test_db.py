"""The database's line of defence, and what is told after a commit."""

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import InternalError, OperationalError, SQLAlchemyError

from cluster.db import Database, after_commit, before_commit, is_transient

pytestmark = pytest.mark.both_databases


async def test_a_server_that_is_away_is_an_error_worth_trying_again() -> None:
    database = Database("postgresql+asyncpg://nobody@127.0.0.1:1/nothing")
    for opened in (database.transaction, database.read_transaction):
        with pytest.raises(OperationalError) as refused:
            async with opened():
                raise AssertionError("there is nothing to connect to")
        assert is_transient(refused.value)
    await database.close()


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
async def test_a_value_that_no_database_takes_is_not(database: Database) -> None:
    for value, type_ in (("\ud800", "text"), ("\0", "text"), ("no number", "integer"), (2**70, "bigint")):
        with pytest.raises(SQLAlchemyError) as refused:
            async with database.transaction() as session:
                await session.execute(text(f"SELECT CAST(:value AS {type_})"), {"value": value})
        assert not is_transient(refused.value)


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
async def test_a_driver_that_loses_its_way_is_tried_again(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncpg says such a thing where a connection breaks off in the middle; the statement is not to blame."""

    async def lost(*_: object, **__: object) -> None:
        raise asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress")

    async with database.read_transaction() as session:
        await session.execute(text("SELECT 1"))
        with monkeypatch.context() as driver:
            driver.setattr(asyncpg.Connection, "prepare", lost)
            with pytest.raises(InternalError) as refused:
                await session.execute(text("SELECT 2"))
    assert is_transient(refused.value)


async def test_nobody_hears_of_what_was_rolled_back(database: Database) -> None:
    heard: list[str] = []

    async def last() -> None:
        heard.append("last")

    async with database.transaction() as session:
        after_commit(session, lambda: heard.append("committed"))
        before_commit(session, last)
        heard.append("work")
    assert heard == ["work", "last", "committed"]
    with pytest.raises(ZeroDivisionError):
        await _fail(database, heard)
    assert heard == ["work", "last", "committed"]


async def _fail(database: Database, heard: list[str]) -> None:
    async with database.transaction() as session:
        after_commit(session, lambda: heard.append("never"))
        _ = 1 / 0
