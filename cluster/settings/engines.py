"""Settings of the engines that run models."""

from pydantic import Field, field_validator

from cluster.settings.base import Section
from cluster.times import parse_duration


class EngineSettings(Section):
    memory_mb: int | None = Field(
        ge=64, description="Memory that loaded models may take in each engine. Null: half of what the machine has."
    )
    replicas: int = Field(ge=0, le=64, description="Most processes that run GGUF models.")
    least_replicas: int | None = Field(
        ge=0, le=64, description="How many of them run while nobody asks; more as requests come. Null: all, always."
    )
    idle_seconds: float = Field(gt=0, description="After which a process that nobody asks goes, where that is allowed.")
    transformers_replicas: int = Field(
        ge=0,
        le=64,
        description="Most processes that run models that are no GGUF. None runs before somebody asks for such a model.",
    )
    folders: dict[str, str] = Field(
        description="Names for models that are no GGUF: folders on this machine, or ids of the Hugging Face hub."
    )
    load_in_4bit: bool = Field(description="Whether models that are no GGUF are packed into 4 bits as they are loaded.")
    slots: int = Field(ge=1, le=64, description="Requests that one loaded model answers at the same time.")
    queue: int = Field(ge=0, le=10_000, description="Requests that may wait for a slot before others get a 503.")
    context: int = Field(ge=256, le=1_048_576, description="Tokens that a conversation may have, if the model can.")
    threads: int | None = Field(ge=1, le=1024, description="Processor threads of one engine. Null: all cores.")
    gpu_layers: int = Field(ge=-1, description="Layers of a model that go to the GPU. -1: all, when there is one.")
    keep_alive: float | str | None = Field(
        description="How long a model stays in memory after its last answer: seconds, or 10m; 0 is not at all. "
        "Null: until its memory is needed."
    )
    cache_gb: float = Field(gt=0, description="Disk that copies of model files may take on each machine.")

    @field_validator("keep_alive")
    @classmethod
    def parse_keep_alive(cls, duration: float | str | None) -> float | None:
        return None if duration is None else parse_duration(duration)


class OllamaSettings(Section):
    url: str | None = Field(
        pattern=r"^https?://[^\s@]+$",
        description="An Ollama server that gets every deployed model, and whose models answer here. Null: none.",
    )
