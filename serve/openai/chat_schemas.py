"""The request and the response of /v1/chat/completions, and the translation of the request for an engine."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from serve.engines.options import SEED_MODULUS
from serve.http.schemas import StrictModel

ModelReference = Annotated[
    str,
    Field(min_length=1, max_length=400, examples=["homelab:latest"], description="NAME:latest, or a version: NAME:v3."),
]
PASSTHROUGH_FIELDS = {
    "temperature",
    "top_p",
    "frequency_penalty",
    "presence_penalty",
    "logprobs",
    "top_logprobs",
    "parallel_tool_calls",
    "response_format",
    "grammar",
}
"""Fields that llama.cpp has under the same name."""
Grammar = Annotated[
    str, Field(min_length=1, max_length=100_000, description="A grammar for the answer, in llama.cpp's GBNF.")
]
MAX_TOKEN_DIGITS = 9
MAX_CHOICES = 16


class TextPart(StrictModel):
    type: Literal["text"]
    text: str


class FunctionCall(StrictModel):
    name: str = Field(min_length=1)
    arguments: str = Field(description="JSON.")


class ToolCall(StrictModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(StrictModel):
    """A message. A received answer may be sent back unchanged; OpenAI's other fields of an answer must be null."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = Field(
        default=None, description="In a message of a tool: the id of the call that it answers."
    )
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = Field(default=None, max_length=0)

    @model_validator(mode="after")
    def validate_content(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"a message of the role {self.role} needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only a message of the role assistant may have tool_calls")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("a message of the role tool needs a tool_call_id, and no other message may have one")
        return self

    def for_engine(self) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content,
        }
        extra = self.model_dump(include={"name", "tool_calls", "tool_call_id", "reasoning_content"}, exclude_none=True)
        return message | extra


class Function(StrictModel):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict, description="JSON Schema.")
    strict: bool | None = None


class Tool(StrictModel):
    type: Literal["function"]
    function: Function


class ChosenFunction(StrictModel):
    name: str


class ChosenTool(StrictModel):
    type: Literal["function"]
    function: ChosenFunction


class PlainFormat(StrictModel):
    type: Literal["text", "json_object"]


class NamedSchema(StrictModel):
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class SchemaFormat(StrictModel):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class StreamOptions(StrictModel):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ChatRequest(StrictModel):
    """OpenAI's request. An unsupported field is an error, because it would have no effect."""

    model: ModelReference
    messages: list[ChatMessage] = Field(min_length=1, max_length=10_000)
    temperature: float | None = Field(default=None, ge=0, le=2, description="0: the most likely tokens.")
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1, description="Newer name of max_tokens.")
    stop: str | list[str] | None = Field(default=None, max_length=1000)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        default=None, max_length=300, description="Maps ids of tokens to a bias, which is added to the logits."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES, description="Number of choices. Null: 1.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[Tool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: PlainFormat | SchemaFormat | None = None
    grammar: Grammar | None = None
    user: str | None = Field(default=None, description="Not used.")
    metadata: dict[str, str] | None = Field(default=None, description="Not used.")
    store: Literal[False] | None = None

    @model_validator(mode="after")
    def validate_combination(self) -> Self:
        if isinstance(self.tool_choice, ChosenTool) and not self._chosen_tools():
            raise ValueError(f"tool_choice names {self.tool_choice.function.name}, which is not among the tools")
        if self.tool_choice == "required" and not self.tools:
            raise ValueError("tool_choice required needs tools")
        if not all(token.isdecimal() and len(token) <= MAX_TOKEN_DIGITS for token in self.logit_bias or ()):
            raise ValueError("the keys of logit_bias must be ids of tokens")
        if self.grammar and (self.tools or (self.response_format and self.response_format.type != "text")):
            raise ValueError("only one of grammar, tools and response_format may be set")
        if self.stream_options and not self.stream:
            raise ValueError("stream_options needs stream")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        if self.logprobs and self.stream and self.tools:
            raise ValueError("logprobs are not available together with stream and tools")
        return self

    def for_engine(self, choice_index: int = 0) -> dict[str, Any]:
        """The request for one choice. A seed is varied by the index, so that the choices differ reproducibly."""
        engine_request = self.model_dump(include=PASSTHROUGH_FIELDS, exclude_none=True, by_alias=True)
        engine_request["messages"] = [message.for_engine() for message in self.messages]
        if max_tokens := self.max_completion_tokens or self.max_tokens:
            engine_request["max_tokens"] = max_tokens
        if self.stop:
            engine_request["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        if self.seed is not None:
            engine_request["seed"] = (self.seed + choice_index) % SEED_MODULUS
        if self.logit_bias:
            engine_request["logit_bias"] = [[int(token), bias] for token, bias in self.logit_bias.items()]
        if tools := self._chosen_tools():
            engine_request["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
            # llama.cpp takes no names here, but can be forced to call the only tool of a request.
            engine_request["tool_choice"] = (
                "required" if isinstance(self.tool_choice, ChosenTool) else self.tool_choice or "auto"
            )
        return engine_request

    def _chosen_tools(self) -> list[Tool]:
        tools = self.tools or []
        if not isinstance(self.tool_choice, ChosenTool):
            return tools
        return [tool for tool in tools if tool.function.name == self.tool_choice.function.name]


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class Choice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = None


class ChatCompletion(BaseModel):
    id: str = Field(examples=["chatcmpl-3f0c"])
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
