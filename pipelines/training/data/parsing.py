"""Parse lines of JSONL into samples, and write samples as lines."""

from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, cast

import orjson
from pydantic import ValidationError

from cluster.errors import InvalidRequest
from pipelines.training.data.messages import validate_text
from pipelines.training.data.samples import PreferencePair, Sample

MAX_LINE_BYTES = 8_000_000
FORMAT_HELP = (
    'a line is {"messages": [...]} for chat, or {"messages": [...], "chosen": ..., "rejected": ...} for preferences; '
    "both may have tools"
)


class InvalidSample(InvalidRequest):
    """A line of the data is not a valid sample."""

    code = "INVALID_SAMPLE"


class EmptyData(InvalidRequest):
    """There is no sample in the data."""

    code = "EMPTY_DATA"


class WrongKindOfData(InvalidRequest):
    """This method of training needs another kind of data."""

    code = "WRONG_KIND_OF_DATA"


def parse_samples(text: str | bytes | Iterable[str | bytes], source: str) -> list[Sample] | list[PreferencePair]:
    """All samples of a JSONL text, or of its lines. An error names the line and the source."""
    samples = list(read_samples(_split_lines(text), source))
    if not samples:
        raise EmptyData(f"There is no sample in {source}: {FORMAT_HELP}.")
    return cast(list[Sample] | list[PreferencePair], samples)


def read_samples(lines: Iterable[str | bytes], source: str) -> Iterator[Sample | PreferencePair]:
    """Parse lines one by one. All samples must be of the same kind. Blank lines are skipped."""
    first_type: type[Sample | PreferencePair] | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        location = f"line {number} of {source}"
        sample = parse_sample(parse_json_line(line, location), location)
        first_type = first_type or type(sample)
        if not isinstance(sample, first_type):
            raise InvalidSample(
                f"The {location} is {_kind_name(type(sample))}, those before are {_kind_name(first_type)}: split them."
            )
        yield sample


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of an uploaded file. An overlong line comes in parts, so that it cannot exhaust memory."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        yield line


def parse_json_line(line: str | bytes, location: str) -> Any:
    """Parse one line as JSON that every database can store."""
    if len(line) > MAX_LINE_BYTES:
        raise InvalidSample(f"The {location} has more than {MAX_LINE_BYTES} bytes.")
    raw = line.encode(errors="surrogatepass") if isinstance(line, str) else line
    try:
        document = orjson.loads(raw.removeprefix(b"\xef\xbb\xbf"))
        validate_text(document)
    except orjson.JSONDecodeError as error:
        raise InvalidSample(f"The {location} is not JSON: {error}.") from None
    except ValueError as error:
        raise InvalidSample(f"The {location} cannot be stored: {error}.") from None
    return document


def parse_sample(document: Any, location: str) -> Sample | PreferencePair:
    try:
        if not isinstance(document, dict):
            raise ValueError(f"it is not an object; {FORMAT_HELP}")
        fields = cast(dict[str, Any], document)
        if fields.keys() & {"chosen", "rejected", "preferred_output", "non_preferred_output"}:
            return PreferencePair.model_validate(_to_pair_fields(fields))
        if "messages" not in fields:
            raise ValueError(f"it has no messages; {FORMAT_HELP}")
        # OpenAI's files may have parallel_tool_calls. It affects serving only.
        return Sample.model_validate({name: fields[name] for name in fields if name != "parallel_tool_calls"})
    except ValidationError as error:
        raise InvalidSample(
            f"The {location} is not a valid sample: {first_error_message(error)}.", details={"place": location}
        ) from None
    except ValueError as error:
        raise InvalidSample(f"The {location} is not a valid sample: {error}.", details={"place": location}) from None


def to_json_line(sample: Sample | PreferencePair) -> bytes:
    """A sample as its canonical line: equal samples give equal bytes."""
    return orjson.dumps(sample.model_dump(exclude_none=True), option=orjson.OPT_APPEND_NEWLINE)


def first_error_message(error: ValidationError) -> str:
    """The path and the message of the first error: `messages.1.content: Input should be a valid string`."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{path}: {message}" if path else message


def _to_pair_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Convert the two other formats of a pair into ours."""
    if "input" in fields:
        input_fields = fields["input"]
        if not isinstance(input_fields, dict):
            raise ValueError("input is an object with messages")
        extra = fields.keys() - {"input", "preferred_output", "non_preferred_output"}
        unknown = extra | (input_fields.keys() - {"messages", "tools", "parallel_tool_calls"})
        if unknown:
            raise ValueError(f"the field '{min(unknown)}' is unknown")
        return {
            **{name: input_fields[name] for name in ("messages", "tools") if name in input_fields},
            "chosen": fields.get("preferred_output"),
            "rejected": fields.get("non_preferred_output"),
        }
    pair = dict(fields)
    if "prompt" in pair and "messages" not in pair:
        pair["messages"] = _to_messages(pair.pop("prompt"), "user")
    for answer in ("chosen", "rejected"):
        if answer in pair:
            pair[answer] = _to_messages(pair[answer], "assistant")
    return pair


def _to_messages(value: Any, role: str) -> Any:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [value] if isinstance(value, dict) else value


def _split_lines(text: str | bytes | Iterable[str | bytes]) -> Iterable[str | bytes]:
    # Not splitlines(): it also splits at U+2028 and other characters that a JSON string may contain.
    if isinstance(text, str):
        return text.split("\n")
    return text.split(b"\n") if isinstance(text, bytes) else text


def _kind_name(kind: type[Sample | PreferencePair]) -> str:
    return "chat" if kind is Sample else "preferences"
