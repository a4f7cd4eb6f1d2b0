"""The request for a job."""

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cluster.times import RequestTime
from jobs.registry import Resources

MAX_DEPENDENCIES = 1000


class JobRequest(BaseModel):
    """A job that somebody wants done."""

    model_config = ConfigDict(extra="forbid", strict=True)

    kind: str = Field(max_length=100, examples=["probe"], description="GET /api/v1/jobs/kinds lists them.")
    spec: dict[str, Any] = Field(default_factory=dict, description="What to do, as this kind defines it.")
    priority: int = Field(default=0, ge=-1000, le=1000, description="Higher goes first.")
    run_after: RequestTime | None = Field(default=None, description="Not before this time.")
    depends_on: list[str] = Field(
        default_factory=list, max_length=MAX_DEPENDENCIES, description="Jobs that must succeed first."
    )
    max_attempts: int | None = Field(default=None, ge=1, le=100, description="Null: as the kind says.")
    resources: Resources | None = Field(default=None, description="Null: as the kind says.")
    tracked: bool | None = Field(default=None, description="Whether it is a run in MLflow. Null: as the kind says.")


def request_hash(request: JobRequest) -> str:
    return hashlib.sha256(json.dumps(request.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
