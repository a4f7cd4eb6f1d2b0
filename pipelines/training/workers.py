"""Training workers: the cluster's nodes, each with a permanent number, and the labels that select them."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import String, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from cluster.db import Base, advisory_lock, now
from cluster.errors import NotFound

NODE_LABEL = "forgearr.io/node"
"""A label that stays the same when Ray is restarted. Not all nodes have it."""
RAY_LABEL = "ray.io/node-id"


class WorkerNotFound(NotFound):
    """There is no such training worker."""

    code = "TRAINING_WORKER_NOT_FOUND"


class TrainingWorker(Base):
    __tablename__ = "training_workers"

    id: Mapped[int] = mapped_column(primary_key=True)
    node: Mapped[str] = mapped_column(String(200), unique=True)  # the value of `label`
    label: Mapped[str] = mapped_column(String(64))  # NODE_LABEL or RAY_LABEL
    last_seen_at: Mapped[datetime] = mapped_column(default=now)


def label_and_name(node: dict[str, Any]) -> tuple[str, str]:
    """The label that selects a node, and its value."""
    label = NODE_LABEL if NODE_LABEL in node["Labels"] else RAY_LABEL
    return label, node["Labels"].get(label, node["NodeID"])


async def register_workers(session: AsyncSession, nodes: Sequence[dict[str, Any]]) -> list[TrainingWorker]:
    """Add those of these nodes that are new. Returns all workers, in the order of their numbers."""
    await advisory_lock(session, "training_workers")
    workers_by_node = {worker.node: worker for worker in await session.scalars(select(TrainingWorker))}
    for node in nodes:
        label, name = label_and_name(node)
        if name not in workers_by_node:
            workers_by_node[name] = TrainingWorker(node=name, label=label)
            session.add(workers_by_node[name])
            await session.flush()
        workers_by_node[name].last_seen_at = now()
    return sorted(workers_by_node.values(), key=lambda worker: worker.id)


async def worker_exists(session: AsyncSession, worker_id: int) -> bool:
    return await session.get(TrainingWorker, worker_id) is not None


async def labels_of(session: AsyncSession, worker_id: int) -> dict[str, str]:
    """The labels with which a job runs on this worker."""
    worker = await session.get(TrainingWorker, worker_id)
    if worker is None:
        raise WorkerNotFound(f"There is no training worker {worker_id}; GET /api/training/workers lists them.")
    return {worker.label: worker.node}
