"""The requests and responses of the forge's routes."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from cluster.errors import InvalidRequest
from cluster.times import UtcTime
from pipelines.training import progress
from pipelines.training.spec import DataSource, FineTuneSpec, ModelName


class NoTrainingData(InvalidRequest):
    """Training data is missing: send data with one of dataset, prompts (by ids, tags or category) or folder."""

    code = "NO_TRAINING_DATA"


def _require_data(schema: dict[str, Any]) -> None:
    """Show `data` as required. It has a default only so that a missing one gets an error message of its own."""
    schema["required"] = [*schema["required"], "data"]
    del schema["properties"]["data"]["default"]


class FineTuneRequest(FineTuneSpec):
    model_config = ConfigDict(strict=True, json_schema_extra=_require_data)

    name: ModelName = Field(alias="project_name")
    pissa: bool = Field(default=False, alias="use_pissa")
    data: DataSource | SkipJsonSchema[None] = Field(  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
        default=None, description="Training data: exactly one of dataset, prompts and folder."
    )


class JobSubmitted(BaseModel):
    job_id: str
    status: progress.Status
    message: str


class StatusView(progress.TrainingProgress):
    job_id: str
    error: str | None
    created_at: UtcTime
    updated_at: UtcTime


class ValidationView(BaseModel):
    job_id: str
    passed: bool | None = Field(description="Null: not known yet, or the validation job failed.")
    metrics: dict[str, float | None]
    report_path: str | None
    reasons: list[str] = Field(description="Why the model did not pass.")
    validation_job_id: str


class DeploymentView(BaseModel):
    job_id: str
    success: bool | None = Field(description="Null: not known yet.")
    model_name: str | None
    gguf_path: str | None
    message: str | None = Field(description="Why the deployment failed.")
    deployment_job_id: str
