"""What /v1/responses takes and answers, as OpenAI has it, and how that is said to an engine, which knows only chats.

An item is one thing of a conversation: a message, some reasoning, a call of a function or what that has answered. They
are kept and told as plain documents, each with an id in which that of its response is (serve/stored_responses.py).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from cluster.errors import InvalidRequest
from serve.bodies.chat import ChatRequest, Function, ModelReference, Strict

Item = dict[str, Any]
ItemStatus = Literal["in_progress", "completed", "incomplete"]
ItemId = Annotated[str, Field(min_length=1, max_length=100)]
ResponseId = Annotated[str, Field(max_length=100)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]

LOGPROBS = "message.output_text.logprobs"
MOST_ITEMS = 10_000
PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}
ANYTHING = [{"role": "user", "content": ""}]
"""A conversation to check the rest of a request with."""


class CallUnknown(InvalidRequest):
    """What a function has answered belongs to a call, which comes before it in the conversation."""

    code = "CALL_NOT_FOUND"


class InputText(Strict):
    type: Literal["input_text"]
    text: str


class OutputText(Strict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = Field(default=None, max_length=0)
    logprobs: list[dict[str, Any]] | None = None


class Message(Strict):
    """What somebody has said. An answer may be sent back as it came; what OpenAI adds to those must be null."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[InputText | OutputText, Field(discriminator="type")]]
    id: ItemId | None = None
    status: ItemStatus | None = None
    phase: None = None

    def item(self) -> Item:
        said = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        if self.role == "assistant":
            content = [{"type": "output_text", "text": text, "annotations": []} for text in said]
        else:
            content = [{"type": "input_text", "text": text} for text in said]
        return {"type": "message", "role": self.role, "content": content, "status": "completed"}


class FunctionCallItem(Strict):
    type: Literal["function_call"]
    call_id: str = Field(min_length=1, max_length=200)
    name: str = Field(min_length=1)
    arguments: str = Field(description="JSON.")
    id: ItemId | None = None
    status: ItemStatus | None = None
    namespace: None = None
    caller: None = None

    def item(self) -> Item:
        return {**self.model_dump(include={"type", "call_id", "name", "arguments"}), "status": "completed"}


class FunctionCallOutput(Strict):
    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1, max_length=200, description="Of the call that this answers.")
    output: str | list[InputText]
    id: ItemId | None = None
    status: ItemStatus | None = None

    def item(self) -> Item:
        return {**self.model_dump(include={"type", "call_id", "output"}), "status": "completed"}


class ReasoningText(Strict):
    type: Literal["reasoning_text"]
    text: str


class SummaryText(Strict):
    type: Literal["summary_text"]
    text: str


class Reasoning(Strict):
    """What a model has thought, in words. Encrypted thoughts are another server's."""

    type: Literal["reasoning"]
    summary: list[SummaryText] = Field(default_factory=list[SummaryText])
    content: list[ReasoningText] | None = None
    encrypted_content: None = None
    id: ItemId | None = None
    status: ItemStatus | None = None

    def item(self) -> Item:
        content = [part.model_dump() for part in self.content or []]
        return {**self.model_dump(include={"type", "summary"}), "content": content, "status": "completed"}


class ItemReference(Strict):
    """An item of a response that is stored, by its id."""

    type: Literal["item_reference"] | None = None
    id: ItemId


def _type_of(item: Any) -> str | None:
    if not isinstance(item, dict):
        return getattr(item, "type", None) or "item_reference"
    return item.get("type") or ("message" if "role" in item else "item_reference")


InputItem = Annotated[
    Annotated[Message, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[Reasoning, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")],
    Discriminator(_type_of),
]


class FunctionTool(Strict):
    type: Literal["function"]
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="JSON Schema.")
    strict: bool | None = None

    @field_validator("type", mode="before")
    @classmethod
    def refuse_by_name(cls, kind: object) -> object:
        if isinstance(kind, str) and kind != "function":
            raise ValueError(f"there is no tool of the type {kind[:100]} here, only function")
        return kind

    def for_chat(self) -> dict[str, Any]:
        function = self.model_dump(include=set(Function.model_fields), exclude_none=True)
        return {"type": "function", "function": function}


class ChosenFunction(Strict):
    type: Literal["function"]
    name: str


class AllowedTools(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[ChosenFunction] = Field(min_length=1, max_length=128)


class AnyFormat(Strict):
    type: Literal["text", "json_object"]


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextConfiguration(Strict):
    format: AnyFormat | SchemaFormat | None = None
    verbosity: None = None


class NoReasoning(Strict):
    """How much a model thinks cannot be chosen here."""

    effort: None = None
    summary: None = None
    generate_summary: None = None


class StreamOptions(Strict):
    include_obfuscation: Literal[False] | None = None


class ResponseRequest(Strict):
    """OpenAI's request. What is not here is refused, since the answer would not be what was asked for."""

    model: ModelReference
    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=MOST_ITEMS)]
    instructions: str | None = Field(default=None, description="A system message for this response only.")
    previous_response_id: ResponseId | None = Field(default=None, description="The stored one that this goes on from.")
    tools: list[FunctionTool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfiguration | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_output_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    include: list[Literal["message.output_text.logprobs"]] | None = Field(default=None, max_length=10)
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    store: bool | None = Field(default=None, description="Whether to keep it, to read and to go on from. Null: yes.")
    metadata: Metadata | None = Field(default=None, description="Kept with the response.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    truncation: Literal["disabled"] | None = None
    reasoning: NoReasoning | None = None
    background: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    user: str | None = Field(default=None, description="Not used.")
    safety_identifier: str | None = Field(default=None, description="Not used.")
    prompt_cache_key: str | None = Field(default=None, description="Not used: prompts are remembered without one.")
    conversation: None = None
    prompt: None = None
    max_tool_calls: None = None

    @model_validator(mode="after")
    def fit_together(self) -> Self:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is for answers with stream")
        if self.top_logprobs and not self._logprobs():
            raise ValueError(f"top_logprobs needs {LOGPROBS} in include")
        if isinstance(self.tool_choice, AllowedTools):
            known = {tool.name for tool in self.tools or []}
            if unknown := [tool.name for tool in self.tool_choice.tools if tool.name not in known]:
                raise ValueError(f"tool_choice names {unknown[0]}, which is not among the tools")
        try:
            self._chat()
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        return self

    @property
    def references(self) -> list[str]:
        """The ids of the stored items that it refers to."""
        return [] if isinstance(self.input, str) else [one.id for one in self.input if isinstance(one, ItemReference)]

    def items(self, response_id: str, referred: Mapping[str, Item]) -> list[Item]:
        """What it brings, each with an id; instead of a reference, what it refers to."""
        given = [Message(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        items: list[Item] = []
        for position, one in enumerate(given):
            if isinstance(one, ItemReference):
                items.append(referred[one.id])
                continue
            item = one.item()
            items.append({"id": one.id or item_id(response_id, item["type"], position), **item})
        return items

    def for_engine(self, items: Iterable[Item]) -> dict[str, Any]:
        """For an answer to all that was said until now."""
        ruled = [{"role": "system", "content": self.instructions}] if self.instructions is not None else []
        return {**self._chat().for_engine(), "messages": [*ruled, *messages_of(items)]}

    def repeated(self) -> dict[str, Any]:
        """What a response says again of its request. What nobody chose, and the engine decides, is null."""
        asked = self.model_dump(
            mode="json",
            by_alias=True,
            include={
                *("model", "instructions", "previous_response_id", "temperature", "top_p", "max_output_tokens"),
                *("top_logprobs", "user", "safety_identifier", "prompt_cache_key"),
            },
        )
        text = self.text.model_dump(mode="json", by_alias=True, exclude_none=True) if self.text else {}
        return asked | {
            "tools": [tool.model_dump() for tool in self.tools or []],
            "tool_choice": "auto" if self.tool_choice is None else self.model_dump()["tool_choice"],
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "text": {"format": {"type": "text"}, **text},
            "store": self.store is not False,
            "metadata": self.metadata or {},
            "truncation": "disabled",
            "reasoning": {"effort": None, "summary": None},
            "background": False,
            "service_tier": "default",
            "max_tool_calls": None,
        }

    def _chat(self) -> ChatRequest:
        """The same wishes in a chat's words, which are checked there."""
        tools = self.tools or []
        choice: Any = self.tool_choice
        if isinstance(choice, AllowedTools):
            allowed = {tool.name for tool in choice.tools}
            tools, choice = [tool for tool in tools if tool.name in allowed], choice.mode
        if isinstance(choice, ChosenFunction):
            choice = {"type": "function", "function": {"name": choice.name}}
        asked: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_completion_tokens": self.max_output_tokens,
            "tools": [tool.for_chat() for tool in tools] or None,
            "tool_choice": choice,
            "parallel_tool_calls": self.parallel_tool_calls is not False if tools else None,
            "response_format": self._format(),
            "stream": self.stream,
        }
        if self._logprobs():
            asked |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        return ChatRequest.model_validate({"model": self.model, "messages": ANYTHING, **asked})

    def _logprobs(self) -> bool:
        return LOGPROBS in (self.include or [])

    def _format(self) -> dict[str, Any] | None:
        wanted = self.text.format if self.text else None
        if not isinstance(wanted, SchemaFormat):
            return wanted.model_dump() if wanted else None
        told = wanted.model_dump(by_alias=True, exclude_none=True)
        return {"type": told.pop("type"), "json_schema": told}


def messages_of(items: Iterable[Item]) -> list[dict[str, Any]]:
    """A conversation as an engine reads it: what an assistant thinks, says and calls in one go is one message."""
    messages: list[dict[str, Any]] = []
    turn: dict[str, Any] | None = None  # the assistant's, as long as it lasts
    for item in items:
        kind = item["type"]
        if not (kind in {"reasoning", "function_call"} or item.get("role") == "assistant"):
            turn = None
            messages.append(_other_message(item))
            continue
        begins = kind != "function_call" and turn is not None and (turn["content"] or "tool_calls" in turn)
        if turn is None or begins:
            turn = {"role": "assistant", "content": ""}
            messages.append(turn)
        if kind == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            turn.setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})
        elif kind == "message":
            turn["content"] = _text(item["content"])
        elif thought := _text(item["content"] or item["summary"]):
            turn["reasoning_content"] = turn.get("reasoning_content", "") + thought
    return messages


def item_id(response_id: str, kind: str, position: int) -> str:
    """It says where the item is: in which response, and at which place among what that was given and has answered."""
    return f"{PREFIXES[kind]}_{response_id.removeprefix('resp_')}{position:04x}"


def check_calls(items: Sequence[Item]) -> None:
    """Refuse an answer to a call that nobody made; a chat template would show it to the model as if it had."""
    called: set[str] = set()
    for item in items:
        if item["type"] == "function_call":
            called.add(item["call_id"])
        if item["type"] == "function_call_output" and item["call_id"] not in called:
            raise CallUnknown(f"There is no call '{item['call_id']}' in the conversation before what answers it.")


def _other_message(item: Item) -> dict[str, Any]:
    if item["type"] == "function_call_output":
        output = item["output"]
        said = output if isinstance(output, str) else _text(output)
        return {"role": "tool", "tool_call_id": item["call_id"], "content": said}
    role = "system" if item["role"] == "developer" else item["role"]
    return {"role": role, "content": _text(item["content"])}


def _text(parts: Iterable[Item]) -> str:
    return "".join(part["text"] for part in parts)


class InputDetails(BaseModel):
    cached_tokens: int = Field(description="Tokens that the engine remembered from requests before.")
    cache_write_tokens: int = Field(description="Tokens that it read anew, and remembers.")


class OutputDetails(BaseModel):
    reasoning_tokens: int | None = Field(description="Null: the engine did not count them.")


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseError(BaseModel):
    code: str
    message: str


class IncompleteDetails(BaseModel):
    reason: Literal["max_output_tokens"]


class Response(BaseModel):
    id: str = Field(examples=["resp_0f3e5d0b6c1f4f0f9b7d6a5e4c3b2a19"])
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed", "cancelled"] = Field(
        description="Cancelled: whoever asked went away in the middle."
    )
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[dict[str, Any]] = Field(description="Items: reasoning, a message, calls of functions.")
    usage: ResponseUsage | None
    instructions: str | None
    previous_response_id: str | None
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    text: dict[str, Any]
    temperature: float | None
    top_p: float | None
    max_output_tokens: int | None
    top_logprobs: int | None
    store: bool
    metadata: dict[str, str]
    truncation: Literal["disabled"]
    reasoning: dict[str, None]
    background: Literal[False]
    service_tier: Literal["default"]
    max_tool_calls: None
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None


class DeletedResponse(BaseModel):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True
