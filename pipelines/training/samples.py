"""What a model learns from: conversations, and preferred beside rejected answers. A dataset has one of them per line.

A line of chat is `{"messages": […], "tools": […]}` in the form of OpenAI's API; one that was made from a repository
also says where it is from. A line of preferences is `{"messages", "tools", "chosen", "rejected"}`; it may also be told
as OpenAI does (`input`, `preferred_output`, `non_preferred_output`) or as `{"prompt", "chosen", "rejected"}`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Literal, Self, cast

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cluster.errors import InvalidRequest

LINE_MAX_BYTES = 8_000_000
MAX_DEPTH = 100
FORMS = (
    'a line is {"messages": [...]} for chat, or {"messages": [...], "chosen": ..., "rejected": ...} for preferences; '
    "both may have tools"
)


class InvalidSample(InvalidRequest):
    """A line of the data is no sample."""

    code = "INVALID_SAMPLE"


class EmptyData(InvalidRequest):
    """There is no sample in the data."""

    code = "EMPTY_DATA"


class WrongKindOfData(InvalidRequest):
    """This method of training learns from another kind of data."""

    code = "WRONG_KIND_OF_DATA"


class Part(BaseModel):
    """What a message is made of. An unknown field may change what is meant, so it is an error unless it is empty."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def forget_what_is_empty(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        fields = cast(Mapping[str, Any], value)
        return {name: held for name, held in fields.items() if name in cls.model_fields or held not in (None, [])}


class FunctionCall(Part):
    name: str = Field(min_length=1, max_length=200)
    arguments: str = Field(description="A JSON object, as text.", examples=['{"title": "Inception"}'])

    @field_validator("arguments", mode="before")
    @classmethod
    def write_object(cls, value: Any) -> Any:
        return orjson.dumps(value).decode() if isinstance(value, dict) else value

    @field_validator("arguments")
    @classmethod
    def be_object(cls, value: str) -> str:
        try:
            arguments = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise ValueError(f"is not JSON: {error}") from None
        if not isinstance(arguments, dict):
            raise ValueError("must be a JSON object, as text")
        check_text(arguments)
        return value


class ToolCall(Part):
    id: str = Field(min_length=1, max_length=200, examples=["call_1"])
    type: Literal["function"] = "function"
    function: FunctionCall


class Function(Part):
    name: str = Field(min_length=1, max_length=200, examples=["search_movies"])
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="JSON Schema of the arguments.")
    strict: bool | None = None


class Tool(Part):
    """A function that the assistant may call."""

    type: Literal["function"] = "function"
    function: Function


class Message(Part):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = Field(default=None, max_length=200, description="Of a tool's message: which call.")
    name: str | None = Field(default=None, max_length=200)

    @field_validator("role", mode="before")
    @classmethod
    def know_developers(cls, value: Any) -> Any:
        return "system" if value == "developer" else value

    @field_validator("content", mode="before")
    @classmethod
    def join_texts(cls, value: Any) -> Any:
        """OpenAI's API also takes content as a list of parts."""
        if not isinstance(value, list):
            return value
        texts = [_text_of(part) for part in cast(list[Any], value)]
        if None in texts:
            raise ValueError("only text can be learned, not images or sounds")
        return "".join(text for text in texts if text)

    @model_validator(mode="before")
    @classmethod
    def weigh_nothing(cls, value: Any) -> Any:
        """OpenAI's files may give a message a weight: 1 says nothing new, and 0 is something that we cannot do."""
        if isinstance(value, dict) and "weight" in value:
            message = cast(dict[str, Any], value)
            if message["weight"] not in (None, 1):
                raise ValueError("every answer is learned: leave the weight out, or the message")
            return {name: held for name, held in message.items() if name != "weight"}
        return value

    @model_validator(mode="after")
    def fit_its_role(self) -> Self:
        if self.role == "assistant":
            if self.tool_calls is not None and not self.tool_calls:
                self.tool_calls = None
            if not self.tool_calls and not (self.content or "").strip():
                raise ValueError("the assistant neither says nor calls anything")
        elif self.tool_calls:
            raise ValueError("only the assistant calls tools")
        elif self.content is None or (self.role == "user" and not self.content.strip()):
            raise ValueError(f"the {self.role} says nothing: content is missing")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("a tool's message, and no other, has a tool_call_id")
        return self


class Source(Part):
    """Where in a repository a sample is from. It is not learned."""

    kind: str | None = Field(default=None, max_length=40, description="What sort of question it is.")
    path: str | None = Field(default=None, max_length=4096)
    lines: list[int] | None = Field(default=None, min_length=2, max_length=2, description="First and last, from 1.")
    commit: str | None = Field(default=None, max_length=64)


class Sample(Part):
    """A conversation that ends with what the assistant should say."""

    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = None
    source: Source | None = None

    @model_validator(mode="after")
    def make_sense(self) -> Self:
        self.tools = self.tools or None
        check_conversation(self.messages, self.tools)
        return self


class Pair(Part):
    """A conversation up to an answer, with a better and a worse one."""

    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = None
    chosen: list[Message] = Field(min_length=1)
    rejected: list[Message] = Field(min_length=1)

    @model_validator(mode="after")
    def make_sense(self) -> Self:
        self.tools = self.tools or None
        for answer in (self.chosen, self.rejected):
            if answer[0].role != "assistant":
                raise ValueError(
                    "chosen and rejected begin with the assistant's answer; what comes before is in messages"
                )
            check_conversation([*self.messages, *answer], self.tools)
        if self.chosen == self.rejected:
            raise ValueError("chosen and rejected are the same, so there is nothing to prefer")
        return self


def parse(text: str | bytes | Iterable[str | bytes], source: str) -> list[Sample] | list[Pair]:
    """All samples of a JSONL text or of its lines. An error names the line and the source."""
    samples = list(read(_lines(text), source))
    if not samples:
        raise EmptyData(f"There is no sample in {source}: {FORMS}.")
    return cast(list[Sample] | list[Pair], samples)


def read(lines: Iterable[str | bytes], source: str) -> Iterator[Sample | Pair]:
    """The samples of these lines, one by one, all of one sort. Blank lines say nothing."""
    first: type[Sample | Pair] | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"line {number} of {source}"
        sample = as_sample(read_json(line, place), place)
        first = first or type(sample)
        if not isinstance(sample, first):
            raise InvalidSample(
                f"The {place} is {_sort(type(sample))}, and those before are {_sort(first)}: split them."
            )
        yield sample


def lines_of(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file that somebody sent: one without end is not read to its end."""
    while line := file.readline(LINE_MAX_BYTES + 1):
        yield line


def read_json(line: str | bytes, place: str) -> Any:
    """One line as JSON that can be kept anywhere."""
    if len(line) > LINE_MAX_BYTES:
        raise InvalidSample(f"The {place} has more than {LINE_MAX_BYTES} bytes.")
    raw = line.encode(errors="surrogatepass") if isinstance(line, str) else line
    try:
        document = orjson.loads(raw.removeprefix(b"\xef\xbb\xbf"))
        check_text(document)
    except orjson.JSONDecodeError as error:
        raise InvalidSample(f"The {place} is not JSON: {error}.") from None
    except ValueError as error:
        raise InvalidSample(f"The {place} cannot be kept: {error}.") from None
    return document


def as_sample(document: Any, place: str) -> Sample | Pair:
    try:
        if not isinstance(document, dict):
            raise ValueError(f"it is no object; {FORMS}")
        fields = cast(dict[str, Any], document)
        if fields.keys() & {"chosen", "rejected", "preferred_output", "non_preferred_output"}:
            return Pair.model_validate(_as_pair(fields))
        if "messages" not in fields:
            raise ValueError(f"it has no messages; {FORMS}")
        # OpenAI's files may say it; it is about serving, not about what is learned.
        return Sample.model_validate({name: fields[name] for name in fields if name != "parallel_tool_calls"})
    except ValidationError as error:
        raise InvalidSample(f"The {place} is no sample: {sentence(error)}.", details={"place": place}) from None
    except ValueError as error:
        raise InvalidSample(f"The {place} is no sample: {error}.", details={"place": place}) from None


def line_of(sample: Sample | Pair) -> bytes:
    """A sample as the one line that says it, so that the same content is the same bytes."""
    return orjson.dumps(sample.model_dump(exclude_none=True), option=orjson.OPT_APPEND_NEWLINE)


def sentence(error: ValidationError) -> str:
    """The first fault that was found: `messages.1.content: Input should be a valid string`."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = ".".join(str(part) for part in fault["loc"])
    message = fault["msg"].removeprefix("Value error, ")
    return f"{path}: {message}" if path else message


def check_conversation(messages: Sequence[Message], tools: Sequence[Tool] | None) -> None:
    """Raises ValueError about what no chat template could tell, or what would be learned by nobody."""
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise ValueError("it has no assistant's turn, so there is nothing to learn")
    if roles[-1] != "assistant":
        raise ValueError(f"its last message is the {roles[-1]}'s; it must be the assistant's")
    known = {tool.function.name for tool in tools or ()}
    called: set[str] = set()
    for number, message in enumerate(messages):
        for call in message.tool_calls or ():
            if call.function.name not in known:
                raise ValueError(f"messages.{number} calls '{call.function.name}', which is not among its tools")
            called.add(call.id)
        if message.tool_call_id is not None and message.tool_call_id not in called:
            raise ValueError(
                f"messages.{number} answers the call '{message.tool_call_id}', which nobody made before it"
            )


def check_text(value: Any) -> None:
    """Raises ValueError about what is too deep to be looked through, or has a character that no database stores."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        if any(isinstance(one, str) and "\0" in one for one in level):
            raise ValueError("text may not contain the character U+0000")
        held = [one for one in level if isinstance(one, dict | list)]
        level = [child for one in held for child in ((*one, *one.values()) if isinstance(one, dict) else one)]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def _as_pair(fields: dict[str, Any]) -> dict[str, Any]:
    """The other two ways to tell a pair, in ours."""
    if "input" in fields:
        told = fields["input"]
        if not isinstance(told, dict):
            raise ValueError("input is an object with messages")
        extra = fields.keys() - {"input", "preferred_output", "non_preferred_output"}
        unknown = extra | (told.keys() - {"messages", "tools", "parallel_tool_calls"})
        if unknown:
            raise ValueError(f"'{min(unknown)}' is not known here")
        return {
            **{name: told[name] for name in ("messages", "tools") if name in told},
            "chosen": fields.get("preferred_output"),
            "rejected": fields.get("non_preferred_output"),
        }
    pair = dict(fields)
    if "prompt" in pair and "messages" not in pair:
        pair["messages"] = _as_messages(pair.pop("prompt"), "user")
    for answer in ("chosen", "rejected"):
        if answer in pair:
            pair[answer] = _as_messages(pair[answer], "assistant")
    return pair


def _as_messages(value: Any, role: str) -> Any:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [value] if isinstance(value, dict) else value


def _text_of(part: Any) -> str | None:
    if isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text":
        text = cast(dict[str, Any], part)["text"]
        return text if isinstance(text, str) else None
    return None


def _lines(text: str | bytes | Iterable[str | bytes]) -> Iterable[str | bytes]:
    # Not splitlines: JSON may hold U+2028 and other characters that it takes for the end of a line.
    if isinstance(text, str):
        return text.split("\n")
    return text.split(b"\n") if isinstance(text, bytes) else text


def _sort(kind: type[Sample | Pair]) -> str:
    return "chat" if kind is Sample else "preferences"
