"""What /api/chat and /api/generate take, as Ollama has it, and the same as a request to an engine."""

import json
from collections import deque
from collections.abc import Mapping, Set
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from cluster.times import seconds_of
from serve.bodies.chat import MOST_SEEDS, ModelReference, Tool

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


def _know_duration(said: float | str | None) -> float | str | None:
    if said is not None:
        seconds_of(said)
    return said


KeepAlive = Annotated[
    float | str | None,
    Field(
        description="How long the model stays in memory afterwards: seconds, or 5m; negative: until its memory is "
        "needed. Null: as in the settings."
    ),
    AfterValidator(_know_duration),
]


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


class Asked(BaseModel):
    """What both have."""

    model_config = ConfigDict(extra="forbid")

    model: ModelReference
    stream: bool | None = Field(default=None, description="Null: true.")
    format: Literal["", "json"] | dict[str, Any] | None = Field(default=None, description="json, or a JSON schema.")
    options: Options | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    keep_alive: KeepAlive = None

    @property
    def is_streamed(self) -> bool:
        return self.stream is not False

    def common(self) -> dict[str, Any]:
        wanted = self.options.for_engine() if self.options else {}
        if self.format == "json":
            wanted["response_format"] = {"type": "json_object"}
        elif self.format:
            wanted["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": self.format},
            }
        if self.think is not None:
            wanted["chat_template_kwargs"] = {"enable_thinking": self.think is not False}
            if isinstance(self.think, str):
                wanted["reasoning_effort"] = self.think
        if self.logprobs:
            wanted |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        return wanted


class CalledFunction(BaseModel):
    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class Call(BaseModel):
    """Ollama's calls have no id of their own; those of some clients do."""

    id: str | None = None
    function: CalledFunction


class Message(BaseModel):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: Annotated[list[str] | None, Field(max_length=0)] = None
    tool_calls: list[Call] | None = None
    tool_name: str | None = Field(default=None, description="Of a tool's message: the function that was called.")
    tool_call_id: str | None = None


class ChatRequest(Asked):
    messages: list[Message] = Field(default_factory=list[Message], max_length=10_000)
    tools: list[Tool] | None = Field(default=None, max_length=128)

    def for_engine(self) -> dict[str, Any]:
        wanted = {**self.common(), "messages": conversation(self.messages)}
        if self.tools:
            wanted["tools"] = [tool.model_dump(exclude_none=True) for tool in self.tools]
        return wanted


class GenerateRequest(Asked):
    prompt: str = ""
    system: str | None = None
    raw: bool | None = Field(default=None, description="Go on from the prompt as it is, without the model's template.")
    suffix: Annotated[str | None, Field(max_length=0)] = None
    template: Annotated[str | None, Field(max_length=0)] = None
    context: Annotated[list[int] | None, Field(max_length=0)] = None
    images: Annotated[list[str] | None, Field(max_length=0)] = None

    @model_validator(mode="after")
    def fit_together(self) -> Self:
        if self.raw and self.system:
            raise ValueError("a raw prompt has no system message: write it into the prompt")
        return self

    def for_engine(self) -> dict[str, Any]:
        if self.raw:
            return {**self.common(), "prompt": self.prompt}
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {**self.common(), "messages": [*system, {"role": "user", "content": self.prompt}]}


def conversation(messages: list[Message]) -> list[dict[str, Any]]:
    """As OpenAI has it, where a tool's message names the call that it answers."""
    told: list[dict[str, Any]] = []
    open_calls = deque[tuple[str, str]]()  # name and id, in the order in which they were made
    for number, message in enumerate(messages):
        one: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.thinking:
            one["reasoning_content"] = message.thinking
        if message.tool_calls:
            one["tool_calls"] = []
            for index, call in enumerate(message.tool_calls):
                identifier = call.id or f"call_{number}_{index}"
                open_calls.append((call.function.name, identifier))
                arguments = json.dumps(call.function.arguments, ensure_ascii=False, separators=(",", ":"))
                function = {"name": call.function.name, "arguments": arguments}
                one["tool_calls"].append({"id": identifier, "type": "function", "function": function})
        if message.role == "tool":
            one["tool_call_id"] = message.tool_call_id or _answered(open_calls, message.tool_name)
        told.append(one)
    return told


def _answered(open_calls: deque[tuple[str, str]], name: str | None) -> str:
    """The oldest call of that name that has no answer yet, or the oldest of all when none is named."""
    for call in open_calls:
        if name is None or call[0] == name:
            open_calls.remove(call)
            return call[1]
    return name or "call"
