"""Helpers that run the jobs for downloads in this process, and record the events that these publish."""

import asyncio
from concurrent.futures import Future
from typing import Any

from sqlalchemy import select, update

from cluster import events
from cluster.db import Database, now
from cluster.services import store as service_store
from cluster.services.store import Service
from cluster.settings import get_settings
from jobs.context import Context
from jobs.leases import Claim
from pipelines.media.downloads import log as recovery_log
from pipelines.media.downloads.log import Recovery
from pipelines.media.downloads.policy import RecoveryPolicy
from pipelines.media.downloads.recover_downloads import RecoverDownloadsSpec, recover_downloads
from pipelines.media.downloads.tables import FollowedDownload, FollowedService
from pipelines.media.downloads.watch_downloads import WatchDownloadsSpec, watch_downloads
from tests.support.recording_link import RecordingLink


class RecordedEvents:
    """A fake of the events actor that records each message."""

    def __init__(self) -> None:
        self.messages: list[events.Message] = []
        self.publish = self

    def remote(self, messages: list[events.Message]) -> "RecordedEvents":
        self.messages += messages
        return self

    def future(self) -> Future[None]:
        finished = Future[None]()
        finished.set_result(None)
        return finished

    def of(self, type: str) -> list[dict[str, Any]]:  # noqa: A002
        return [message["data"] for message in self.messages if message["type"] == type]


class DownloadJobs:
    """Runs the jobs as a worker does, and reads the rows that they write."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.link = RecordingLink()

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
        """Run a recovery without waiting for the time at which recoveries are tried again."""
        async with self.database.transaction() as session:
            await session.execute(update(Recovery).values(again_at=now()))
        await self.recover()

    async def recoveries(self) -> list[Recovery]:
        return await self._all(Recovery)

    async def recoveries_of(self, title: str) -> list[Recovery]:
        return [recovery for recovery in await self.recoveries() if recovery.title == title]

    async def downloads(self) -> dict[str, FollowedDownload]:
        return {row.item: row for row in await self._all(FollowedDownload)}

    async def service_state(self) -> FollowedService:
        (row,) = await self._all(FollowedService)
        return row

    async def decisions(self) -> list[tuple[str, str]]:
        return [(recovery.decision, recovery.outcome) for recovery in await self.recoveries()]

    async def _all(self, table: Any) -> list[Any]:
        async with self.database.read_transaction() as session:
            return list(await session.scalars(select(table).order_by(*table.__mapper__.primary_key)))

    def _context(self) -> Context:
        claim = Claim("job_1", "token", "recover_downloads", {}, None, 1, 3, None, None, {}, "worker-1", None)
        return Context(claim, self.link)
