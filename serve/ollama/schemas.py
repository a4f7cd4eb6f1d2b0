"""The requests of /api/chat and /api/generate, and their translation for an engine."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from cluster.times import parse_duration
from serve.engines.messages import Message, to_openai_messages
from serve.engines.options import Options
from serve.openai.chat_schemas import ModelReference, Tool


def _validate_duration(value: float | str | None) -> float | str | None:
    if value is not None:
        parse_duration(value)
    return value


KeepAlive = Annotated[
    float | str | None,
    Field(
        description="How long the model stays in memory afterwards: seconds, or a duration such as 5m. Negative: until "
        "its memory is needed. Null: as the settings say. Has no effect on models of others, unless you are an "
        "administrator."
    ),
    AfterValidator(_validate_duration),
]


class BaseRequest(BaseModel):
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

    def common_fields(self) -> dict[str, Any]:
        fields = self.options.for_engine() if self.options else {}
        if self.format == "json":
            fields["response_format"] = {"type": "json_object"}
        elif self.format:
            fields["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": self.format},
            }
        if self.think is not None:
            fields["chat_template_kwargs"] = {"enable_thinking": self.think is not False}
            if isinstance(self.think, str):
                fields["reasoning_effort"] = self.think
        if self.logprobs:
            fields |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        return fields


class ChatRequest(BaseRequest):
    messages: list[Message] = Field(default_factory=list[Message], max_length=10_000)
    tools: list[Tool] | None = Field(default=None, max_length=128)

    def for_engine(self) -> dict[str, Any]:
        engine_request = {**self.common_fields(), "messages": to_openai_messages(self.messages)}
        if self.tools:
            engine_request["tools"] = [tool.model_dump(exclude_none=True) for tool in self.tools]
        return engine_request


class GenerateRequest(BaseRequest):
    prompt: str = ""
    system: str | None = None
    raw: bool | None = Field(default=None, description="Complete the prompt as it is, without the chat template.")
    suffix: Annotated[str | None, Field(max_length=0)] = None
    template: Annotated[str | None, Field(max_length=0)] = None
    context: Annotated[list[int] | None, Field(max_length=0)] = None
    images: Annotated[list[str] | None, Field(max_length=0)] = None

    @model_validator(mode="after")
    def validate_combination(self) -> Self:
        if self.raw and self.system:
            raise ValueError("raw does not allow system: write the system message into the prompt")
        return self

    def for_engine(self) -> dict[str, Any]:
        if self.raw:
            return {**self.common_fields(), "prompt": self.prompt}
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {**self.common_fields(), "messages": [*system, {"role": "user", "content": self.prompt}]}
