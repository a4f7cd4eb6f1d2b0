"""Prometheus metrics of the queue, read from the database at every scrape.

/metrics is public, so its cost must not grow with the jobs that are stored. Of the jobs that have finished, only those
of the last hour are counted, and each query reads a part of an index.
"""

from datetime import timedelta

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from sqlalchemy import func, select

from cluster.db import get_database, now
from jobs.registry import kinds
from jobs.states import FINISHED, State
from jobs.tables import Job

RECENT = timedelta(hours=1)


async def job_families() -> list[Metric]:
    by_kind = select(Job.kind, Job.state, func.count()).where(Job.kind.in_(kinds())).group_by(Job.kind, Job.state)
    unfinished = by_kind.where(Job.state.in_(set(State) - FINISHED))
    recent = by_kind.where(Job.state.in_(FINISHED), Job.finished_at > now() - RECENT)
    # `demand` is the first column of the index of runnable jobs.
    runnable = select(func.count(), func.min(Job.created_at)).where(
        Job.state == State.QUEUED, Job.unfinished_dependencies == 0, ~Job.delayed, Job.demand >= ""
    )
    async with get_database().read_transaction() as session:
        counts = [*await session.execute(unfinished), *await session.execute(recent)]
        depth, oldest = (await session.execute(runnable)).one()
    jobs = GaugeMetricFamily(
        "jobs", "Jobs by kind and state; of the finished ones, those of the last hour.", labels=["kind", "state"]
    )
    for kind, state, count in counts:
        jobs.add_metric([kind, state], count)
    age = (now() - oldest).total_seconds() if oldest else 0.0
    return [
        jobs,
        GaugeMetricFamily("job_queue_depth", "Jobs that could start if there were room.", depth),
        GaugeMetricFamily("job_queue_oldest_seconds", "Age of the oldest of these jobs.", age),
    ]
