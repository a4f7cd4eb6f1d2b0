"""The audit log: an entry lives and dies with the transaction of what it is about."""

import logging
from datetime import timedelta

import pytest
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from cluster import audit_log
from cluster.audit_log import AuditLogEntry
from cluster.db import Database, now
from cluster.logs import request_address, request_id
from cluster.ownership import LOCAL, Principal
from cluster.settings import get_settings

ADA = Principal(id="a" * 36, name="ada")


async def entries(database: Database) -> list[AuditLogEntry]:
    async with database.read_transaction() as session:
        return list(await session.scalars(select(AuditLogEntry).order_by(AuditLogEntry.id)))


async def test_an_entry_tells_who_did_what_and_from_where(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    tokens = request_id.set("request-1"), request_address.set("192.0.2.1")
    with caplog.at_level(logging.INFO, "cluster.audit_log"):
        async with database.transaction() as session:
            audit_log.record(session, "key.create", ADA, "key-1", name="laptop")
            assert not caplog.messages
    request_id.reset(tokens[0])
    request_address.reset(tokens[1])
    await audit_log.record_alone("login", None, "x" * 1000, outcome="failed")
    first, second = await entries(database)
    assert (first.actor, first.actor_id, first.action, first.target) == ("ada", ADA.id, "key.create", "key-1")
    assert (first.outcome, first.details, first.address) == ("succeeded", {"name": "laptop"}, "192.0.2.1")
    assert (first.request_id, first.created_at <= now()) == ("request-1", True)
    assert (second.actor, second.actor_id, second.outcome, second.details) == (None, None, "failed", None)
    assert (second.address, second.target) == (None, "x" * audit_log.MAX_TARGET_LENGTH)
    assert caplog.messages[0] == (
        f'action="key.create" outcome="succeeded" actor_id="{ADA.id}" actor="ada" address="192.0.2.1" '
        'target="key-1" details={"name": "laptop"}'
    )


async def test_what_is_rolled_back_was_not_done(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "cluster.audit_log"), pytest.raises(RuntimeError):
        async with database.transaction() as session:
            await _fail_after_record(session)
    assert await entries(database) == []
    assert not caplog.messages


async def test_old_entries_are_deleted(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_LOGS__AUDIT_LOG_DAYS", "10")
    get_settings.cache_clear()
    for _ in range(2):
        await audit_log.record_alone("login", ADA)
    old, new = await entries(database)
    async with database.transaction() as session:
        moment = now() - timedelta(days=11)
        await session.execute(update(AuditLogEntry).where(AuditLogEntry.id == old.id).values(created_at=moment))
    assert await audit_log.remove_old(database) == 1
    assert [entry.id for entry in await entries(database)] == [new.id]


async def _fail_after_record(session: AsyncSession) -> None:
    audit_log.record(session, "key.create", LOCAL)
    raise RuntimeError
