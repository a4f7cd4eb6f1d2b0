"""The database's line of defence, and what is told after a commit."""

import pytest
from sqlalchemy.exc import OperationalError

from cluster.db import Database, after_commit, before_commit, is_passing


async def test_a_server_that_is_away_is_an_error_worth_trying_again() -> None:
    database = Database("postgresql+asyncpg://nobody@127.0.0.1:1/nothing")
    for opened in (database.transaction, database.reading):
        with pytest.raises(OperationalError) as refused:
            async with opened():
                raise AssertionError("there is nothing to connect to")
        assert is_passing(refused.value)
    await database.close()


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
