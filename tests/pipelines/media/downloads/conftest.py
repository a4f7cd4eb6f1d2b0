"""Fixtures of the tests of downloads."""

import pytest

from cluster import events
from cluster.db import Database
from tests.pipelines.media.downloads.download_jobs import DownloadJobs, RecordedEvents


@pytest.fixture
def jobs(database: Database) -> DownloadJobs:
    return DownloadJobs(database)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> RecordedEvents:
    published = RecordedEvents()

    def find(name: str) -> RecordedEvents:
        assert name == events.ACTOR_NAME
        return published

    monkeypatch.setattr(events, "find_actor", find)
    monkeypatch.setattr(events, "_no_lookup_before", 0.0)
    return published
