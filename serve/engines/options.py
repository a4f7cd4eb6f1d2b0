"""Options of a generation, by Ollama's names."""

from collections.abc import Mapping, Set
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_SEEDS = 2**32 - 1


PASSED_ON = {
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
"""Options that llama.cpp takes as they come."""
OF_LOADING = {
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
"""How a model is loaded is said in this server's settings. Programs send these to every Ollama, so they pass."""


class Options(BaseModel):
    """Of an option that is not here, nobody could say whether it was heeded: it is refused."""

    model_config = ConfigDict(extra="forbid")

    temperature: float | None = Field(default=None, ge=0, le=100)
    top_k: int | None = Field(default=None, ge=0, le=2**31 - 1)
    top_p: float | None = Field(default=None, ge=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    typical_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: str | list[str] | None = Field(default=None, max_length=1000)
    num_predict: int | None = Field(default=None, ge=-2, le=2**31 - 1, description="-1, -2: as long as there is room.")
    repeat_last_n: int | None = Field(default=None, ge=-1, le=2**31 - 1)
    repeat_penalty: float | None = Field(default=None, ge=0, le=100)
    presence_penalty: float | None = Field(default=None, ge=-100, le=100)
    frequency_penalty: float | None = Field(default=None, ge=-100, le=100)
    mirostat: Literal[0, 1, 2] | None = None
    mirostat_tau: float | None = Field(default=None, ge=0, le=1000)
    mirostat_eta: float | None = Field(default=None, ge=0, le=1000)

    @model_validator(mode="before")
    @classmethod
    def leave_loading_out(cls, said: Any) -> Any:
        if not isinstance(said, Mapping):
            return said
        return without_loading(said)

    def for_engine(self) -> dict[str, Any]:
        wanted = self.model_dump(include=PASSED_ON, exclude_none=True)
        if self.num_predict is not None and self.num_predict >= 0:
            wanted["max_tokens"] = self.num_predict
        if self.seed is not None:
            wanted["seed"] = self.seed % MOST_SEEDS
        if self.stop:
            wanted["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        return wanted


def without_loading(said: Mapping[str, Any], kept: Set[str] = frozenset()) -> dict[str, Any]:
    """Options, without those of how a model is loaded."""
    left_out = OF_LOADING - kept
    return {name: value for name, value in said.items() if name not in left_out and value is not None}


class Parameters(Options):
    num_ctx: int | None = Field(default=None, ge=256, le=1_048_576, description="Tokens, if the model can.")

    @model_validator(mode="before")
    @classmethod
    def leave_loading_out(cls, said: Any) -> Any:
        if not isinstance(said, Mapping):
            return said
        return without_loading(said, kept={"num_ctx"})
