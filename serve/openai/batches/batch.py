"""The kind `batch`: executes the requests of a batch (/v1/batches)."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from jobs.context import Context
from jobs.registry import job
from serve.openai.batches.store import ID_MAX, KIND

MAX_ATTEMPTS = 10


class BatchSpec(BaseModel):
    """The batch to execute. /v1/batches creates the batch together with its job; no other job may execute it."""

    model_config = ConfigDict(extra="forbid")

    batch_id: str = Field(max_length=ID_MAX)


@job(KIND, spec=BatchSpec, max_attempts=MAX_ATTEMPTS)
def batch(context: Context, spec: BatchSpec) -> dict[str, Any]:
    """Executes the requests of a batch (/v1/batches)."""
    from serve.openai.batches.runner import run

    return run(context, spec.batch_id)
