"""The schema of a request for a job."""

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cluster.times import RequestTime
from jobs.registry import Resources

MAX_DEPENDENCIES = 1000


class JobRequest(BaseModel):
    """A request for a job."""

    model_config = ConfigDict(extra="forbid", strict=True)

    kind: str = Field(max_length=100, examples=["probe"], description="GET /api/v1/jobs/kinds lists them.")
    spec: dict[str, Any] = Field(default_factory=dict, description="Its parameters, as the kind defines them.")
    priority: int = Field(default=0, ge=-1000, le=1000, description="Higher ones run first.")
    run_after: RequestTime | None = Field(default=None, description="It does not start before this time.")
    depends_on: list[str] = Field(
        default_factory=list, max_length=MAX_DEPENDENCIES, description="Jobs that must succeed first."
    )
    max_attempts: int | None = Field(default=None, ge=1, le=100, description="Null: the kind's default.")
    resources: Resources | None = Field(default=None, description="Null: the kind's default.")
    tracked: bool | None = Field(
        default=None, description="Whether it is recorded in MLflow. Null: the kind's default."
    )


def request_hash(request: JobRequest) -> str:
    return hashlib.sha256(json.dumps(request.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
