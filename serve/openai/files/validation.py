"""Validates a file for its purpose: training samples, or the requests of a batch."""

from typing import Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import ForgearrError, InvalidRequest
from pipelines.training.data.parsing import EmptyData, first_error_message, parse_json_line, read_lines, read_samples
from pipelines.training.data.samples import PreferencePair

BATCH_URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
MAX_REQUESTS = 50_000

BatchUrl = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]


class InvalidBatchLine(InvalidRequest):
    """A line of the file is not a valid request of a batch."""

    code = "INVALID_BATCH_LINE"


class BatchLine(BaseModel):
    """One request of a batch."""

    model_config = ConfigDict(extra="forbid", strict=True)

    custom_id: str = Field(min_length=1, max_length=512)
    method: Literal["POST"]
    url: BatchUrl
    body: dict[str, Any]


def check_content(purpose: str, file: BinaryIO, name: str) -> tuple[str | None, str | None]:
    """Return the type of its lines (chat, preference or batch), or an error message."""
    try:
        match purpose:
            case "fine-tune":
                return _check_samples(file, name), None
            case "batch":
                return _check_requests(file, name), None
            case _:
                return None, None
    except ForgearrError as error:
        return None, error.message


def parse_batch_line(line: bytes, location: str) -> BatchLine:
    """Parse one request of a batch. `location` names the line in error messages."""
    try:
        return BatchLine.model_validate(parse_json_line(line, location))
    except ValidationError as error:
        raise InvalidBatchLine(
            f"The {location} is not a valid request of a batch: {first_error_message(error)}."
        ) from None


def _check_samples(file: BinaryIO, name: str) -> str:
    kind = ""
    for sample in read_samples(read_lines(file), name):
        kind = "preference" if isinstance(sample, PreferencePair) else "chat"
    if not kind:
        raise EmptyData(f"There is no sample in {name}.")
    return kind


def _check_requests(file: BinaryIO, name: str) -> str:
    lines_by_id: dict[str, int] = {}
    for number, line in enumerate(read_lines(file), 1):
        if not line.strip():
            continue
        location = f"line {number} of {name}"
        custom_id = parse_batch_line(line, location).custom_id
        if custom_id in lines_by_id:
            raise InvalidBatchLine(f"The {location} has the custom_id '{custom_id}' of line {lines_by_id[custom_id]}.")
        lines_by_id[custom_id] = number
        if len(lines_by_id) > MAX_REQUESTS:
            raise InvalidBatchLine(f"There are more than {MAX_REQUESTS} requests in {name}.")
    if not lines_by_id:
        raise EmptyData(f"There is no request in {name}.")
    return "batch"
