"""The request of /v1/responses, and its translation into a chat, which engines take."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from serve.http.schemas import StrictModel
from serve.openai.chat_schemas import ChatRequest, Function, ModelReference
from serve.openai.responses.conversation import to_messages
from serve.openai.responses.items import (
    LOGPROBS_INCLUDE,
    MAX_ITEMS,
    PLACEHOLDER_MESSAGES,
    FunctionCallItem,
    FunctionCallOutput,
    Item,
    ItemReference,
    Message,
    Reasoning,
    item_id,
    item_type,
)

ResponseId = Annotated[str, Field(max_length=100)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
InputItem = Annotated[
    Annotated[Message, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[Reasoning, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")],
    Discriminator(item_type),
]


class FunctionTool(StrictModel):
    type: Literal["function"]
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="JSON Schema.")
    strict: bool | None = None

    @field_validator("type", mode="before")
    @classmethod
    def validate_type(cls, kind: object) -> object:
        if isinstance(kind, str) and kind != "function":
            raise ValueError(f"tools of the type {kind[:100]} are not supported, only function")
        return kind

    def to_chat_tool(self) -> dict[str, Any]:
        function = self.model_dump(include=set(Function.model_fields), exclude_none=True)
        return {"type": "function", "function": function}


class ChosenFunction(StrictModel):
    type: Literal["function"]
    name: str


class AllowedTools(StrictModel):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[ChosenFunction] = Field(min_length=1, max_length=128)


class PlainFormat(StrictModel):
    type: Literal["text", "json_object"]


class SchemaFormat(StrictModel):
    type: Literal["json_schema"]
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextConfiguration(StrictModel):
    format: PlainFormat | SchemaFormat | None = None
    verbosity: None = None


class NoReasoning(StrictModel):
    """The effort of reasoning cannot be set here: all fields must be null."""

    effort: None = None
    summary: None = None
    generate_summary: None = None


class StreamOptions(StrictModel):
    include_obfuscation: Literal[False] | None = None


class ResponseRequest(StrictModel):
    """OpenAI's request. An unsupported field is an error, because it would have no effect."""

    model: ModelReference
    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_ITEMS)]
    instructions: str | None = Field(default=None, description="A system message for this response only.")
    previous_response_id: ResponseId | None = Field(default=None, description="The stored response to continue.")
    tools: list[FunctionTool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfiguration | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_output_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    include: list[Literal["message.output_text.logprobs"]] | None = Field(default=None, max_length=10)
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    store: bool | None = Field(
        default=None, description="Whether to store it, to read or continue it later. Null: true."
    )
    metadata: Metadata | None = Field(default=None, description="Stored with the response.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    truncation: Literal["disabled"] | None = None
    reasoning: NoReasoning | None = None
    background: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    user: str | None = Field(default=None, description="Not used.")
    safety_identifier: str | None = Field(default=None, description="Not used.")
    prompt_cache_key: str | None = Field(default=None, description="Not used: prompts are cached without one.")
    conversation: None = None
    prompt: None = None
    max_tool_calls: None = None

    @model_validator(mode="after")
    def validate_combination(self) -> Self:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options needs stream")
        if self.top_logprobs and not self._includes_logprobs():
            raise ValueError(f"top_logprobs needs {LOGPROBS_INCLUDE} in include")
        if isinstance(self.tool_choice, AllowedTools):
            tool_names = {tool.name for tool in self.tools or []}
            if unknown := [tool.name for tool in self.tool_choice.tools if tool.name not in tool_names]:
                raise ValueError(f"tool_choice names {unknown[0]}, which is not among the tools")
        try:
            self._to_chat_request()
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        return self

    @property
    def is_stored(self) -> bool:
        return self.store is not False

    @property
    def references(self) -> list[str]:
        """The ids of the stored items in the input."""
        return (
            [] if isinstance(self.input, str) else [item.id for item in self.input if isinstance(item, ItemReference)]
        )

    def items(self, response_id: str, referenced_items: Mapping[str, Item]) -> list[Item]:
        """The input as items with ids. References are replaced by the stored items."""
        input_items = [Message(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        items: list[Item] = []
        for position, input_item in enumerate(input_items):
            if isinstance(input_item, ItemReference):
                items.append(referenced_items[input_item.id])
                continue
            item = input_item.to_item()
            items.append({"id": input_item.id or item_id(response_id, item["type"], position), **item})
        return items

    def for_engine(self, items: Iterable[Item]) -> dict[str, Any]:
        """The engine's request for an answer to the conversation."""
        system = [{"role": "system", "content": self.instructions}] if self.instructions is not None else []
        return {**self._to_chat_request().for_engine(), "messages": [*system, *to_messages(items)]}

    def request_fields(self) -> dict[str, Any]:
        """The fields of the request that its response repeats. A field is null if the engine chose its value."""
        fields = self.model_dump(
            mode="json",
            by_alias=True,
            include={
                *("model", "instructions", "previous_response_id", "temperature", "top_p", "max_output_tokens"),
                *("top_logprobs", "user", "safety_identifier", "prompt_cache_key"),
            },
        )
        text = self.text.model_dump(mode="json", by_alias=True, exclude_none=True) if self.text else {}
        return fields | {
            "tools": [tool.model_dump() for tool in self.tools or []],
            "tool_choice": "auto" if self.tool_choice is None else self.model_dump()["tool_choice"],
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "text": {"format": {"type": "text"}, **text},
            "store": self.is_stored,
            "metadata": self.metadata or {},
            "truncation": "disabled",
            "reasoning": {"effort": None, "summary": None},
            "background": False,
            "service_tier": "default",
            "max_tool_calls": None,
        }

    def _to_chat_request(self) -> ChatRequest:
        """The same options as a chat request, which validates them."""
        tools = self.tools or []
        choice: Any = self.tool_choice
        if isinstance(choice, AllowedTools):
            allowed = {tool.name for tool in choice.tools}
            tools, choice = [tool for tool in tools if tool.name in allowed], choice.mode
        if isinstance(choice, ChosenFunction):
            choice = {"type": "function", "function": {"name": choice.name}}
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_completion_tokens": self.max_output_tokens,
            "tools": [tool.to_chat_tool() for tool in tools] or None,
            "tool_choice": choice,
            "parallel_tool_calls": self.parallel_tool_calls is not False if tools else None,
            "response_format": self._response_format(),
            "stream": self.stream,
        }
        if self._includes_logprobs():
            options |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        return ChatRequest.model_validate({"model": self.model, "messages": PLACEHOLDER_MESSAGES, **options})

    def _includes_logprobs(self) -> bool:
        return LOGPROBS_INCLUDE in (self.include or [])

    def _response_format(self) -> dict[str, Any] | None:
        text_format = self.text.format if self.text else None
        if not isinstance(text_format, SchemaFormat):
            return text_format.model_dump() if text_format else None
        json_schema = text_format.model_dump(by_alias=True, exclude_none=True)
        return {"type": json_schema.pop("type"), "json_schema": json_schema}
