"""What Prometheus reads: requests counted in every replica and merged, and whatever others read from the database.

A scrape reaches one replica. Each one leaves its counts with the events actor, so that any of them can answer for all.
A replica that died is still counted; a lost events actor looks like the restart of a counter, which Prometheus expects.
"""

import asyncio
import logging
import secrets
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping

import orjson
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from cluster import events
from cluster.errors import Unavailable
from serve.media.metrics import download_families
from serve.monitoring.job_metrics import job_families

SHARE_SECONDS = 5.0
LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
LABELS = ("method", "path", "status")
METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})

logger = logging.getLogger(__name__)

collectors: list[Callable[[], Awaitable[Iterable[Metric]]]] = [job_families, download_families]
"""Functions that read further metrics at every scrape."""


class RequestMetrics:
    """This replica's counts of requests."""

    def __init__(self) -> None:
        self.replica = secrets.token_hex(8)
        self._registry = CollectorRegistry()
        self._requests = Counter("api_requests", "Requests answered.", LABELS, registry=self._registry)
        self._latency = Histogram(
            "api_request_duration_seconds",
            "Time until an answer began.",
            LABELS,
            buckets=LATENCY_BUCKETS,
            registry=self._registry,
        )
        self._children: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._changed = False

    def observe(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count a request by its route's template: paths as they were sent would have no end."""
        key = (method if method in METHODS else "other", path, status)
        if key not in self._children:
            self._children[key] = (self._requests.labels(*key), self._latency.labels(*key))
        requests, latency = self._children[key]
        requests.inc()
        latency.observe(seconds)
        self._changed = True

    async def share_periodically(self) -> None:
        """Leave the counts with the events actor, over and over, whenever they have changed."""
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

    async def render(self) -> bytes:
        """Everything that there is to know now, in Prometheus' text format."""
        snapshots = await self._shared_snapshots()
        families = [*self._merged(snapshots), *await _collect_families()]
        return generate_latest(_Families(families))

    def snapshot(self) -> events.Snapshot:
        return {
            _key(family, sample): sample.value
            for family in self._registry.collect()
            for sample in family.samples
            if not sample.name.endswith("_created")
        }

    async def _shared_snapshots(self) -> dict[str, events.Snapshot]:
        try:
            snapshots = await events.shared_counts()
        except Unavailable as error:
            logger.debug("Only this replica's requests are counted: %s", error)
            snapshots = {}
        return {**snapshots, self.replica: self.snapshot()}

    def _merged(self, snapshots: Mapping[str, events.Snapshot]) -> list[Metric]:
        """The families of this replica's registry, with every replica's samples added up."""
        totals: defaultdict[str, float] = defaultdict(float)
        for snapshot in snapshots.values():
            for key, value in snapshot.items():
                totals[key] += value
        families = {
            known.name: Metric(known.name, known.documentation, known.type) for known in self._registry.collect()
        }
        for key, value in totals.items():
            family, name, labels = orjson.loads(key)
            if family in families:  # a replica of another version may count what this one does not know
                families[family].add_sample(name, labels, value)
        return list(families.values())


class _Families(Collector):
    """Families that are already collected, as what the text format is made from."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


async def _collect_families() -> list[Metric]:
    families: list[Metric] = []
    for collect in collectors:
        try:
            families.extend(await collect())
        except Exception:
            # The database being down must not hide the requests that fail because of it.
            logger.exception("A part of the metrics could not be read.")
    return families


def _key(family: Metric, sample: Sample) -> str:
    """The name of a sample, the same in every replica and every process."""
    return orjson.dumps([family.name, sample.name, sample.labels], option=orjson.OPT_SORT_KEYS).decode()
