"""What tests of the media stack share: services in the register, jobs that really run, and an ear for what is told."""

import asyncio
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from cluster import events
from cluster.db import Database, now
from cluster.services import store as service_store
from cluster.services.store import Service
from cluster.settings import get_settings
from jobs.context import Context
from jobs.leases import Claim
from jobs.registry import Resources
from jobs.tables import Job
from pipelines.media.downloads import log as recovery_log
from pipelines.media.downloads.log import Recovery
from pipelines.media.downloads.policy import RecoveryPolicy
from pipelines.media.downloads.recover_downloads import RecoverDownloadsSpec, recover_downloads
from pipelines.media.downloads.tables import FollowedDownload, FollowedService
from pipelines.media.downloads.watch_downloads import WatchDownloadsSpec, watch_downloads


class Ear:
    """Stands where the events actor is called, and keeps what it is told."""

    def __init__(self) -> None:
        self.heard: list[events.Message] = []
        self.publish = self

    def remote(self, messages: list[events.Message]) -> "Ear":
        self.heard += messages
        return self

    def future(self) -> Future[None]:
        done = Future[None]()
        done.set_result(None)
        return done

    def of(self, type: str) -> list[dict[str, Any]]:  # noqa: A002
        return [message["data"] for message in self.heard if message["type"] == type]


class Words:
    """The worker of a job, of whose words only the metrics are kept."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def report(self, claim: Claim, values: Mapping[str, Any], event: tuple[str, dict[str, Any]]) -> None:
        self.metrics |= event[1].get("metrics", {})

    def checkpoint(self, claim: Claim, state: Any) -> None: ...
    def artifact(self, claim: Claim, path: Path, name: str) -> str:
        return str(path)

    def child(self, claim: Claim, name: str, kind: str, spec: Mapping[str, Any], resources: Resources | None) -> Job:
        raise AssertionError("these jobs have no children")


class Desk:
    """Runs the jobs, as a worker does, and reads what they have written down."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.words = Words()

    async def add(self, name: str, type: str, url: str, key: str) -> Service:  # noqa: A002
        async with self.database.transaction() as session:
            values = {"name": name, "type": type, "url": url, "api_key": key}
            return await service_store.create(session, values, "ada")

    async def policy(self, **values: Any) -> None:
        policy = {**get_settings().recovery.model_dump(), "dry_run": False, "cooldown_minutes": 0, **values}
        async with self.database.transaction() as session:
            await recovery_log.set_policy(session, RecoveryPolicy.model_validate(policy), "ada")

    async def watch(self) -> dict[str, Any]:
        return await asyncio.to_thread(watch_downloads, self._context(), WatchDownloadsSpec())

    async def recover(self, *, dry_run: bool | None = None) -> dict[str, Any]:
        spec = RecoverDownloadsSpec(dry_run=dry_run)
        return await asyncio.to_thread(recover_downloads, self._context(), spec)

    async def resume(self) -> None:
        """Recover, and do not wait with what was begun."""
        async with self.database.transaction() as session:
            await session.execute(update(Recovery).values(again_at=now()))
        await self.recover()

    async def recoveries(self) -> list[Recovery]:
        return await self._all(Recovery)

    async def about(self, title: str) -> list[Recovery]:
        return [one for one in await self.recoveries() if one.title == title]

    async def downloads(self) -> dict[str, FollowedDownload]:
        return {row.item: row for row in await self._all(FollowedDownload)}

    async def followed(self) -> FollowedService:
        (row,) = await self._all(FollowedService)
        return row

    async def decisions(self) -> list[tuple[str, str]]:
        return [(one.decision, one.outcome) for one in await self.recoveries()]

    async def _all(self, table: Any) -> list[Any]:
        async with self.database.read_transaction() as session:
            return list(await session.scalars(select(table).order_by(*table.__mapper__.primary_key)))

    def _context(self) -> Context:
        claim = Claim("job_1", "token", "recover_downloads", {}, None, 1, 3, None, None, {}, "worker-1", None)
        return Context(claim, self.words)


@pytest.fixture
def desk(database: Database) -> Desk:
    return Desk(database)


@pytest.fixture
def ear(monkeypatch: pytest.MonkeyPatch) -> Ear:
    ear = Ear()

    def find(name: str) -> Ear:
        assert name == events.ACTOR_NAME
        return ear

    monkeypatch.setattr(events, "find_actor", find)
    monkeypatch.setattr(events, "_no_lookup_before", 0.0)
    return ear
