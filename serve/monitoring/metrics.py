"""Prometheus metrics: request counts of all replicas, and metrics that are read from the database.

A scrape reaches one replica. Each replica shares its counts through the events actor, so any of them can respond for
all. The counts of a dead replica stay. A lost events actor resets the counters, which Prometheus expects.
"""

import asyncio
import logging
import secrets
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping

import orjson
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from sqlalchemy.exc import SQLAlchemyError

from cluster import events
from cluster.db import is_transient
from cluster.errors import Unavailable
from serve.media.metrics import download_families
from serve.monitoring.job_metrics import job_families

SHARE_SECONDS = 5.0
CACHE_SECONDS = 5.0
"""How long metrics from the database are cached, because anybody may request them at any rate."""
LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
LABELS = ("method", "path", "status")
METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})

logger = logging.getLogger(__name__)

collectors: list[Callable[[], Awaitable[Iterable[Metric]]]] = [job_families, download_families]
"""Functions that collect the metrics from the database."""


class RequestMetrics:
    """The request counts of this replica."""

    def __init__(self) -> None:
        self.replica = secrets.token_hex(8)
        self._registry = CollectorRegistry()
        self._requests = Counter("api_requests", "Requests with a response.", LABELS, registry=self._registry)
        self._latency = Histogram(
            "api_request_duration_seconds",
            "Time until the start of the response.",
            LABELS,
            buckets=LATENCY_BUCKETS,
            registry=self._registry,
        )
        self._children: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._changed = False
        self._lock = asyncio.Lock()
        self._cached: list[Metric] = []
        self._cached_until = 0.0

    def observe(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count a request. `path` is the route's template: actual paths would create unlimited series."""
        key = (method if method in METHODS else "other", path, status)
        if key not in self._children:
            self._children[key] = (self._requests.labels(*key), self._latency.labels(*key))
        requests, latency = self._children[key]
        requests.inc()
        latency.observe(seconds)
        self._changed = True

    async def share_periodically(self) -> None:
        """Send changed counts to the events actor every SHARE_SECONDS."""
        while True:
            await asyncio.sleep(SHARE_SECONDS)
            await self.share()

    async def share(self) -> None:
        if not self._changed:
            return
        self._changed = False
        try:
            await events.share_counts(self.replica, self.snapshot())
        except Unavailable as error:
            self._changed = True
            logger.debug("Request counts were not shared: %s", error)

    async def render(self, more: Iterable[Metric] = (), *, with_services: bool = True) -> bytes:
        """All metrics and `more` in Prometheus' text format, or all but those of single services."""
        snapshots = await self._shared_snapshots()
        families = [*self._merged(snapshots), *await self._database_families(), *more]
        if not with_services:
            families = [family for family in families if not _has_services(family)]
        return generate_latest(_Families(families))

    def snapshot(self) -> events.Snapshot:
        return {
            _key(family, sample): sample.value
            for family in self._registry.collect()
            for sample in family.samples
            if not sample.name.endswith("_created")
        }

    async def _database_families(self) -> list[Metric]:
        async with self._lock:
            if time.monotonic() >= self._cached_until:
                self._cached = await _collect_families()
                self._cached_until = time.monotonic() + CACHE_SECONDS
            return self._cached

    async def _shared_snapshots(self) -> dict[str, events.Snapshot]:
        try:
            snapshots = await events.shared_counts()
        except Unavailable as error:
            logger.debug("Only this replica's requests are counted: %s", error)
            snapshots = {}
        return {**snapshots, self.replica: self.snapshot()}

    def _merged(self, snapshots: Mapping[str, events.Snapshot]) -> list[Metric]:
        """This replica's families, with the sums of all replicas' samples."""
        totals: defaultdict[str, float] = defaultdict(float)
        for snapshot in snapshots.values():
            for key, value in snapshot.items():
                totals[key] += value
        families = {
            family.name: Metric(family.name, family.documentation, family.type) for family in self._registry.collect()
        }
        for key, value in totals.items():
            family_name, name, labels = orjson.loads(key)
            if family_name in families:  # a replica of another version may have other metrics
                families[family_name].add_sample(name, labels, value)
        return list(families.values())


class _Families(Collector):
    """Passes collected families to `generate_latest`."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


async def _collect_families() -> list[Metric]:
    families: list[Metric] = []
    for collect in collectors:
        try:
            families.extend(await collect())
        except Exception as error:
            if isinstance(error, SQLAlchemyError) and is_transient(error):
                raise  # half the metrics would look as if the queue were gone
            logger.exception("Some metrics could not be collected.")
    return families


def _has_services(family: Metric) -> bool:
    return any("service" in sample.labels for sample in family.samples)


def _key(family: Metric, sample: Sample) -> str:
    """Identifies a sample in all replicas."""
    return orjson.dumps([family.name, sample.name, sample.labels], option=orjson.OPT_SORT_KEYS).decode()
