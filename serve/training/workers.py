"""The route /api/training/workers: the nodes of the cluster, and the GPUs on which they can train."""

import asyncio
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from cluster import nodes as cluster_nodes
from cluster.db import get_database
from cluster.times import UtcTime
from pipelines.training import workers as training_workers
from pipelines.training.workers import TrainingWorker
from serve.security.callers import CurrentCaller

router = APIRouter(prefix="/api/training/workers")


class WorkerView(BaseModel):
    id: int
    name: str
    status: str = Field(description="online or offline", examples=["online"])
    cpus: float | None = Field(description="All CPUs for jobs. Null: offline.")
    gpus: float | None
    gpu_model: str | None = Field(description="Ray's name of it. Null: no GPU, or offline.")
    memory_mb: int | None
    labels: dict[str, str]
    last_seen_at: UtcTime


@router.get("")
async def list_workers(caller: CurrentCaller) -> list[WorkerView]:
    """List all nodes that are or were part of the cluster. The id of a node never changes."""
    alive = await asyncio.to_thread(cluster_nodes.alive_nodes)
    by_name = {training_workers.label_and_name(node)[1]: node for node in alive}
    async with get_database().transaction() as session:
        return [
            _view(worker, by_name.get(worker.node))
            for worker in await training_workers.register_workers(session, alive)
        ]


def _view(worker: TrainingWorker, node: dict[str, Any] | None) -> WorkerView:
    resources: dict[str, float] = node["Resources"] if node else {}
    accelerator = next((name for name in resources if name.startswith("accelerator_type:")), None)
    return WorkerView(
        id=worker.id,
        name=worker.node,
        status="online" if node else "offline",
        cpus=resources.get("CPU", 0) if node else None,
        gpus=resources.get("GPU", 0) if node else None,
        gpu_model=accelerator.partition(":")[2] if accelerator else None,
        memory_mb=int(resources.get("memory", 0) / 2**20) if node else None,
        labels=node["Labels"] if node else {},
        last_seen_at=worker.last_seen_at,
    )
