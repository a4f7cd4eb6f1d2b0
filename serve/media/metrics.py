"""Prometheus metrics of downloads and recoveries, read from the database by its indexes, because they are public."""

from datetime import timedelta

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from sqlalchemy import func, select

from cluster.db import get_database, now
from cluster.services.store import Service
from pipelines.media.downloads.log import Recovery
from pipelines.media.downloads.tables import FollowedDownload, FollowedService

RECENT = timedelta(days=1)
COUNTS = {
    "completed": "Downloads that were completed.",
    "failed": "Downloads that failed.",
    "imported": "Downloads that were imported into a library.",
}


async def download_families() -> list[Metric]:
    async with get_database().read_transaction() as session:
        followed = select(Service.name, FollowedService).join(Service, Service.id == FollowedService.service_id)
        services = (await session.execute(followed)).all()
        stuck = select(FollowedDownload.service_id, func.count().label("number")).where(
            FollowedDownload.service_id.in_([counts.service_id for _, counts in services]), FollowedDownload.strikes > 0
        )
        rows = await session.execute(stuck.group_by(FollowedDownload.service_id))
        strikes: dict[int, int] = {row.service_id: row.number for row in rows}
        decided = select(Recovery.decision, Recovery.outcome, func.count()).where(Recovery.at > now() - RECENT)
        recoveries = (await session.execute(decided.group_by(Recovery.decision, Recovery.outcome))).all()
    families: list[Metric] = []
    for name, description in COUNTS.items():
        counter = CounterMetricFamily(f"downloads_{name}", description, labels=["service"])
        for service, counts in services:
            counter.add_metric([service], getattr(counts, name))
        families.append(counter)
    active = GaugeMetricFamily("downloads_in_queue", "Downloads that have not ended.", labels=["service"])
    bytes_left = GaugeMetricFamily("downloads_bytes_left", "Bytes that they have left.", labels=["service"])
    stalled = GaugeMetricFamily("downloads_without_progress", "Downloads with strikes.", labels=["service"])
    for service, counts in services:
        active.add_metric([service], counts.underway)
        bytes_left.add_metric([service], counts.bytes_left)
        stalled.add_metric([service], strikes.get(counts.service_id, 0))
    decisions = GaugeMetricFamily(
        "recoveries", "Decisions about downloads in the last day.", labels=["decision", "outcome"]
    )
    for decision, outcome, count in recoveries:
        decisions.add_metric([decision, outcome], count)
    return [*families, active, bytes_left, stalled, decisions]
