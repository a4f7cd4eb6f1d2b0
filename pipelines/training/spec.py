"""The specs of fine-tuning, export, validation and deployment. All APIs and commands convert requests to these."""

from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipelines.training import presets

Quantization = Literal["f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0"]

Gate = Literal[
    "min_samples",
    "max_perplexity",
    "max_perplexity_ratio",
    "min_rouge_l",
    "min_exact_match",
    "min_top1_agreement",
    "max_kl",
]
Gates = Annotated[
    dict[Gate, float | None], Field(description="Gates that override those of the settings; null removes one.")
]

ModelName = Annotated[
    str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,99}$", examples=["homelab"], description="The name of the model.")
]
JobId = Annotated[str, Field(max_length=40, examples=["job_20261121_083000_k3x9"])]
Metadata = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]
"""Metadata with OpenAI's limits."""
Folder = Annotated[str, Field(pattern=r"^[/~]", max_length=1000)]


class Spec(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PromptFilter(Spec):
    """Selects the training prompts that meet all of these conditions."""

    ids: list[int] | None = Field(default=None, min_length=1, max_length=100_000)
    tags: list[str] | None = Field(default=None, min_length=1, max_length=100, description="With any of these tags.")
    category: str | None = Field(default=None, max_length=100)
    all_owners: bool = Field(
        default=False,
        description="By tags or a category: also what other users have written, for administrators. Otherwise only "
        "what they and other administrators have.",
    )

    @model_validator(mode="after")
    def require_filter(self) -> Self:
        if self.ids is None and self.tags is None and self.category is None:
            raise ValueError("select prompts by ids, tags or a category")
        return self


class DataSource(Spec):
    """The data of a training: exactly one of these."""

    dataset: str | None = Field(
        default=None, max_length=200, description="A dataset's id or name; demo/homelab ships with Forgearr."
    )
    prompts: PromptFilter | None = None
    folder: Folder | None = Field(default=None, description="A folder or repository of documents on this machine.")
    file: str | None = Field(default=None, max_length=100, description="A file of /v1/files, uploaded for fine-tuning.")

    @model_validator(mode="after")
    def require_one_source(self) -> Self:
        if sum(source is not None for source in (self.dataset, self.prompts, self.folder, self.file)) != 1:
            raise ValueError("name exactly one of dataset, prompts, folder and file")
        return self


class FineTuneSpec(Spec):
    name: ModelName = "forgearr"
    base_model: str = Field(
        default="forgearr/tiny",
        min_length=1,
        max_length=300,
        description="A Hugging Face id, a local folder, a registered version (NAME:v3, NAME:latest), forgearr/tiny, or "
        "a preset (a name in configs/models).",
    )
    data: DataSource
    method: Literal["supervised", "dpo"] = "supervised"

    tuning: Literal["lora", "qlora", "full"] = Field(default="lora", description="qlora: the base in 4 bits (NF4).")
    rank: int = Field(default=16, ge=1, le=1024)
    alpha: int | None = Field(default=None, ge=1, le=4096, description="Null: twice the rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    pissa: bool = Field(default=False, description="Initialize with the principal singular values of the weights.")

    unsloth: bool = Field(default=True, description="Use Unsloth if it is installed and CUDA is available.")

    epochs: float = Field(default=3, gt=0, le=10_000)
    max_steps: int | None = Field(default=None, ge=1, description="Instead of epochs.")
    learning_rate: float = Field(default=2e-4, gt=0)
    batch_size: int | Literal["auto"] = Field(default="auto", description="Per worker. auto: found by trying.")
    gradient_accumulation: int = Field(default=1, ge=1, le=4096)
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    warmup: float = Field(default=0.05, ge=0, lt=1, description="Share of the steps in which the rate rises.")
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    beta: float = Field(default=0.1, gt=0, le=10, description="DPO: how close to stay to the base model.")
    seed: int = Field(default=42, ge=0, le=2**32 - 1)

    max_length: int | None = Field(default=None, ge=16, le=1_000_000, description="In tokens. Null: the model's.")
    long_samples: Literal["refuse", "truncate", "skip"] = "refuse"
    packing: bool = Field(default=False, description="Several short samples in one row.")
    eval_split: float = Field(default=0.1, ge=0, le=0.5, description="Share of the samples that is held out.")
    validation: DataSource | None = Field(default=None, description="The held-out samples, instead of a share.")
    early_stopping: int | None = Field(
        default=None, ge=1, description="Stop after this many evaluations without an improvement."
    )
    eval_steps: int | None = Field(default=None, ge=1, description="Null: after each epoch.")

    checkpoint_steps: int | None = Field(default=None, ge=1)
    checkpoint_minutes: float = Field(default=10, gt=0, le=1440)

    keep_epochs: int = Field(
        default=0, ge=0, le=100, description="The number of last epochs whose models are kept and can be used."
    )

    workers: int = Field(default=1, ge=1, le=1024, description="Processes that train together (DDP).")
    cpus_per_worker: float = Field(default=1, gt=0, le=1024)
    gpus_per_worker: float = Field(default=0, ge=0, le=16)
    labels: dict[str, str] = Field(default_factory=dict, description="Labels that a worker's node must carry.")

    suffix: str | None = Field(default=None, pattern=r"^[a-z0-9_-]{1,64}$", description="Added to the name.")
    tags: dict[str, str] = Field(default_factory=dict, description="Notes, stored as parameters of the MLflow run.")
    metadata: Metadata | None = Field(default=None, description="Notes of a client, by which jobs can be filtered.")

    @property
    def has_held_out(self) -> bool:
        return bool(self.eval_split or self.validation)

    @property
    def full_name(self) -> str:
        return f"{self.name}-{self.suffix}" if self.suffix else self.name

    @model_validator(mode="before")
    @classmethod
    def expand_preset(cls, values: Any) -> Any:
        return presets.apply_preset(cast(dict[str, Any], values)) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def validate_combination(self) -> Self:
        if isinstance(self.batch_size, int) and not 1 <= self.batch_size <= 4096:
            raise ValueError("batch_size must be auto, or from 1 to 4096")
        if self.early_stopping and not self.has_held_out:
            raise ValueError("early_stopping needs held-out samples: set eval_split")
        if self.pissa and self.tuning != "lora":
            raise ValueError("pissa needs tuning: lora")
        if self.pissa and self.method == "dpo":
            raise ValueError("pissa changes the base's weights, which dpo compares with: use only one of them")
        if self.pissa and self.keep_epochs:
            raise ValueError("pissa changes the base's weights, so keep_epochs must be 0")
        if self.packing and self.method == "dpo":
            raise ValueError("packing is for supervised training")
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError("gpus_per_worker above 1 must be a whole number")
        if len(self.full_name) > 100:
            raise ValueError("name and suffix together may have at most 100 characters")
        return self


class ValidateSpec(Spec):
    """Measure the model of a fine-tune, and its export if one is named."""

    job_id: JobId = Field(description="A fine_tune or forge job that succeeded.")
    export_job_id: JobId | None = Field(default=None, description="An export of that job, to be measured too.")
    max_samples: int = Field(default=100, ge=1, le=100_000, description="The number of held-out samples to measure.")
    max_new_tokens: int = Field(default=128, ge=1, le=4096, description="The maximum length of generated answers.")
    gates: Gates = {}


class ExportSpec(Spec):
    """Convert the model of a fine-tune to GGUF files, and register them as a version."""

    job_id: JobId = Field(description="A fine_tune or forge job that succeeded.")
    name: ModelName | None = Field(default=None, description="Null: the name in the fine-tune's spec.")
    quantizations: list[Quantization] = Field(
        default=["q8_0"], min_length=1, max_length=7, description="The first one is served."
    )
    adapter: bool = Field(default=False, description="Export the adapter alone too, as a GGUF LoRA.")


class DeploySpec(Spec):
    """Serve a version as NAME:latest: the named one, or the one that an export job made."""

    name: ModelName | None = None
    version: int | None = Field(default=None, ge=1)
    export_job_id: JobId | None = None
    gates: Gates = {}
    force: bool = Field(default=False, description="Deploy even if validation failed or never ran.")

    @model_validator(mode="after")
    def require_target(self) -> Self:
        named = self.name is not None and self.version is not None
        if (self.name is None) != (self.version is None) or named == (self.export_job_id is not None):
            raise ValueError("give either name and version, or export_job_id")
        return self


class ForgeSpec(FineTuneSpec):
    """From data to a served model: fine-tune, export, validate, deploy."""

    quantizations: list[Quantization] = Field(default=["q8_0"], min_length=1, max_length=7)
    adapter: bool = False
    max_samples: int = Field(default=100, ge=1, le=100_000)
    max_new_tokens: int = Field(default=128, ge=1, le=4096)
    gates: Gates = {}
    deploy: bool = True
    force: bool = Field(default=False, description="Deploy even if validation failed.")

    @model_validator(mode="after")
    def validate_pipeline(self) -> Self:
        if self.adapter and self.tuning == "full":
            raise ValueError("tuning: full makes no adapter to export: use adapter: false, or tuning: lora")
        if not self.has_held_out:
            raise ValueError("validation needs held-out samples: set eval_split above 0")
        return self


def gates_choice(spec: ValidateSpec | ForgeSpec) -> str | None:
    """Whoever chooses the gates decides what passes, so it needs an administrator."""
    return "gates of its own: leave them out, and those of the settings count" if spec.gates else None
