"""The requests and responses of /v1/fine_tuning/jobs."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from pipelines.training.spec import Metadata
from serve.http.schemas import StrictModel

Auto = Literal["auto"]
Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
FileId = Annotated[str, Field(min_length=1, max_length=100)]


class SupervisedHyperparameters(StrictModel):
    batch_size: Auto | Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None, description="auto: as large as memory allows."
    )
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1000)] | None = Field(
        default=None, description="Factor for the default learning rate. auto: 1."
    )
    n_epochs: Auto | Annotated[int, Field(ge=1, le=1000)] | None = Field(default=None, description="auto: 3.")


class DpoHyperparameters(SupervisedHyperparameters):
    beta: Auto | Annotated[float, Field(gt=0, le=10)] | None = Field(default=None, description="auto: 0.1.")


class SupervisedMethod(StrictModel):
    hyperparameters: SupervisedHyperparameters | None = None


class DpoMethod(StrictModel):
    hyperparameters: DpoHyperparameters | None = None


class Method(StrictModel):
    type: Literal["supervised", "dpo", "reinforcement"] = Field(description="reinforcement is not available.")
    supervised: SupervisedMethod | None = None
    dpo: DpoMethod | None = None
    reinforcement: dict[str, Any] | None = None

    @model_validator(mode="after")
    def validate_single_method(self) -> Self:
        for other in {"supervised", "dpo", "reinforcement"} - {self.type}:
            if getattr(self, other) is not None:
                raise ValueError(f"the method {self.type} does not allow {other}")
        return self


class FineTuningJobRequest(StrictModel):
    """OpenAI's request. An unsupported field is an error, because it would have no effect."""

    model: str = Field(
        min_length=1,
        max_length=400,
        description="A Hugging Face id, a registered version (NAME:v3, NAME:latest), forgearr/tiny, a preset, or a "
        "model that was fine-tuned here (ft:…).",
    )
    training_file: FileId
    validation_file: FileId | None = Field(
        default=None, description="Null: a tenth of the samples is the held-out split."
    )
    method: Method | None = None
    hyperparameters: SupervisedHyperparameters | None = Field(default=None, description="Deprecated: use method.")
    suffix: str | None = Field(default=None, min_length=1, max_length=64, description="Part of the model's name.")
    seed: int | None = Field(default=None, ge=0, le=2**31 - 1)
    metadata: Metadata | None = None
    integrations: list[Any] | None = Field(default=None, max_length=0, description="Must be empty: runs are in MLflow.")

    @model_validator(mode="after")
    def validate_hyperparameters(self) -> Self:
        if self.method and self.hyperparameters:
            raise ValueError("set hyperparameters in method, not beside it")
        return self

    @property
    def requested_hyperparameters(self) -> SupervisedHyperparameters:
        method_options = self.method and (self.method.supervised or self.method.dpo)
        return (
            method_options.hyperparameters if method_options else self.hyperparameters
        ) or SupervisedHyperparameters()


class UsedHyperparameters(BaseModel):
    batch_size: int | Auto
    learning_rate_multiplier: float
    n_epochs: int


class UsedDpoHyperparameters(UsedHyperparameters):
    beta: float


class UsedSupervised(BaseModel):
    hyperparameters: UsedHyperparameters


class UsedDpo(BaseModel):
    hyperparameters: UsedDpoHyperparameters


class UsedMethod(BaseModel):
    type: Literal["supervised", "dpo"]
    supervised: UsedSupervised | None = None
    dpo: UsedDpo | None = None


class FineTuningJobError(BaseModel):
    code: str
    message: str
    param: str | None


class FineTuningJob(BaseModel):
    id: str = Field(examples=["job_20261121_083000_k3x9"])
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    status: Status
    error: FineTuningJobError | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    training_file: str = Field(description="A file; of a job that another API created, its data source.")
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    hyperparameters: UsedHyperparameters = Field(description="auto until the value is known.")
    method: UsedMethod
    seed: int
    metadata: dict[str, str] | None
    integrations: list[Any] = []
    user_provided_suffix: str | None


class FineTuningJobEvent(BaseModel):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


class CheckpointMetrics(BaseModel):
    step: int
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None


class Checkpoint(BaseModel):
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: CheckpointMetrics
    step_number: int
