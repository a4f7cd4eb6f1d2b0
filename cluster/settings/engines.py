"""Settings of the engines that run models."""

from pydantic import Field, field_validator

from cluster.settings.base import Section
from cluster.times import parse_duration


class EngineSettings(Section):
    memory_mb: int | None = Field(
        ge=64, description="Memory for loaded models in each engine, in MB. Null: half of the machine's memory."
    )
    replicas: int = Field(ge=0, le=64, description="Maximum number of processes that run GGUF models.")
    least_replicas: int | None = Field(
        ge=0,
        le=64,
        description="Number of these processes that run without requests; more start on demand. Null: all of them run.",
    )
    idle_seconds: float = Field(
        gt=0, description="Time without requests after which a process that was started on demand ends."
    )
    transformers_replicas: int = Field(
        ge=0,
        le=64,
        description="Maximum number of processes that run models in other formats than GGUF. They start on demand.",
    )
    folders: dict[str, str] = Field(
        description="Names for models in other formats than GGUF: folders on this machine, or ids of the Hugging Face "
        "hub."
    )
    load_in_4bit: bool = Field(description="Whether models in other formats than GGUF are loaded with 4-bit weights.")
    slots: int = Field(ge=1, le=64, description="Requests that one loaded model answers at the same time.")
    queue: int = Field(ge=0, le=10_000, description="Requests that may wait for a slot before others get a 503.")
    context: int = Field(
        ge=256, le=1_048_576, description="Maximum length of a conversation in tokens, if the model supports it."
    )
    threads: int | None = Field(ge=1, le=1024, description="Processor threads of one engine. Null: all cores.")
    gpu_layers: int = Field(ge=-1, description="Layers of a model that are put on the GPU, if there is one. -1: all.")
    keep_alive: float | str | None = Field(
        description="How long a model stays in memory after its last answer: seconds, or a duration such as 10m. 0: it "
        "is unloaded at once. Null: until its memory is needed."
    )
    stall_timeout: float | str | None = Field(
        description="How long loading a model, or an answer, may show no progress before the engine's process is "
        "replaced: seconds, or a duration such as 10m. Null: for ever."
    )
    cache_gb: float = Field(gt=0, description="Disk space for cached copies of model files, on each machine.")

    @field_validator("keep_alive", "stall_timeout")
    @classmethod
    def parse_durations(cls, duration: float | str | None) -> float | None:
        return None if duration is None else parse_duration(duration)


class OllamaSettings(Section):
    url: str | None = Field(
        pattern=r"^https?://[^\s@]+$",
        description="An Ollama server. It receives every deployed model, and its own models are available here. Null: "
        "none.",
    )
