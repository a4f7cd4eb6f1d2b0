"""Parse a line of a dataset into a sample."""

from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, cast

import orjson
from pydantic import ValidationError

from cluster.errors import InvalidRequest
from pipelines.training.data.messages import check_text
from pipelines.training.data.samples import Pair, Sample

LINE_MAX_BYTES = 8_000_000
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


def _lines(text: str | bytes | Iterable[str | bytes]) -> Iterable[str | bytes]:
    # Not splitlines: JSON may hold U+2028 and other characters that it takes for the end of a line.
    if isinstance(text, str):
        return text.split("\n")
    return text.split(b"\n") if isinstance(text, bytes) else text


def _sort(kind: type[Sample | Pair]) -> str:
    return "chat" if kind is Sample else "preferences"
