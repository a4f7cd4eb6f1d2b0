"""Generation options under Ollama's names, and their translation for engines."""

from collections.abc import Mapping, Set
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SEED_MODULUS = 2**32 - 1
PASSTHROUGH_OPTIONS = {
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repeat_last_n",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
    "mirostat",
    "mirostat_tau",
    "mirostat_eta",
}
"""Options that llama.cpp has under the same name."""
LOAD_OPTIONS = {
    "num_ctx",
    "num_batch",
    "num_gpu",
    "num_keep",
    "num_thread",
    "main_gpu",
    "numa",
    "use_mmap",
    "use_mlock",
    "low_vram",
    "vocab_only",
    "logits_all",
    "embedding_only",
    "f16_kv",
}
"""Options of loading, which this server's settings decide. Programs send them to every Ollama, so they are ignored."""


class Options(BaseModel):
    """Generation options. An unknown option is an error, because it would have no effect."""

    model_config = ConfigDict(extra="forbid")

    temperature: float | None = Field(default=None, ge=0, le=100)
    top_k: int | None = Field(default=None, ge=0, le=2**31 - 1)
    top_p: float | None = Field(default=None, ge=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    typical_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: str | list[str] | None = Field(default=None, max_length=1000)
    num_predict: int | None = Field(
        default=None, ge=-2, le=2**31 - 1, description="Largest number of tokens. -1, -2: no limit."
    )
    repeat_last_n: int | None = Field(default=None, ge=-1, le=2**31 - 1)
    repeat_penalty: float | None = Field(default=None, ge=0, le=100)
    presence_penalty: float | None = Field(default=None, ge=-100, le=100)
    frequency_penalty: float | None = Field(default=None, ge=-100, le=100)
    mirostat: Literal[0, 1, 2] | None = None
    mirostat_tau: float | None = Field(default=None, ge=0, le=1000)
    mirostat_eta: float | None = Field(default=None, ge=0, le=1000)

    @model_validator(mode="before")
    @classmethod
    def drop_load_options(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return without_load_options(value)

    def for_engine(self) -> dict[str, Any]:
        engine_options = self.model_dump(include=PASSTHROUGH_OPTIONS, exclude_none=True)
        if self.num_predict is not None and self.num_predict >= 0:
            engine_options["max_tokens"] = self.num_predict
        if self.seed is not None:
            engine_options["seed"] = self.seed % SEED_MODULUS
        if self.stop:
            engine_options["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        return engine_options


def without_load_options(options: Mapping[str, Any], allowed: Set[str] = frozenset()) -> dict[str, Any]:
    """The options that are set, without load options except those in `allowed`."""
    excluded = LOAD_OPTIONS - allowed
    return {name: value for name, value in options.items() if name not in excluded and value is not None}


class Parameters(Options):
    num_ctx: int | None = Field(default=None, ge=256, le=1_048_576, description="Size of the context in tokens.")

    @model_validator(mode="before")
    @classmethod
    def drop_load_options(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return without_load_options(value, allowed={"num_ctx"})
