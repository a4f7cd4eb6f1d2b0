"""Prometheus metrics of the queue, read from the database at every scrape."""

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from sqlalchemy import func, select

from cluster.db import get_database, now
from jobs.states import State
from jobs.tables import Job


async def job_families() -> list[Metric]:
    async with get_database().read_transaction() as session:
        counts = await session.execute(select(Job.kind, Job.state, func.count()).group_by(Job.kind, Job.state))
        runnable = select(func.count(), func.min(Job.created_at)).where(
            Job.state == State.QUEUED, Job.unfinished_dependencies == 0, Job.run_after <= now()
        )
        depth, oldest = (await session.execute(runnable)).one()
    jobs = GaugeMetricFamily("jobs", "Jobs by kind and state.", labels=["kind", "state"])
    for kind, state, count in counts.all():
        jobs.add_metric([kind, state], count)
    age = (now() - oldest).total_seconds() if oldest else 0.0
    return [
        jobs,
        GaugeMetricFamily("job_queue_depth", "Jobs that could start if there were room.", depth),
        GaugeMetricFamily("job_queue_oldest_seconds", "Age of the oldest of these jobs.", age),
    ]
