"""What a file must be for its purpose: samples to learn from, or the requests of a batch."""

from typing import Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import ForgearrError, InvalidRequest
from pipelines.training.data.parsing import EmptyData, lines_of, read, read_json, sentence
from pipelines.training.data.samples import Pair

BATCH_URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
MOST_REQUESTS = 50_000

BatchUrl = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]


class InvalidBatchLine(InvalidRequest):
    """A line of the file is no request of a batch."""

    code = "INVALID_BATCH_LINE"


class BatchLine(BaseModel):
    """One request of a batch."""

    model_config = ConfigDict(extra="forbid", strict=True)

    custom_id: str = Field(min_length=1, max_length=512)
    method: Literal["POST"]
    url: BatchUrl
    body: dict[str, Any]


def look(purpose: str, file: BinaryIO, name: str) -> tuple[str | None, str | None]:
    """What its lines are (chat, preference or batch), and what is wrong with them."""
    try:
        match purpose:
            case "fine-tune":
                return _samples(file, name), None
            case "batch":
                return _requests(file, name), None
            case _:
                return None, None
    except ForgearrError as error:
        return None, error.message


def batch_line(line: bytes, place: str) -> BatchLine:
    """A request of a batch, from its line; `place` says where it is, for whoever has to mend it."""
    try:
        return BatchLine.model_validate(read_json(line, place))
    except ValidationError as error:
        raise InvalidBatchLine(f"The {place} is no request of a batch: {sentence(error)}.") from None


def _samples(file: BinaryIO, name: str) -> str:
    kind = ""
    for sample in read(lines_of(file), name):
        kind = "preference" if isinstance(sample, Pair) else "chat"
    if not kind:
        raise EmptyData(f"There is no sample in {name}.")
    return kind


def _requests(file: BinaryIO, name: str) -> str:
    seen: dict[str, int] = {}
    for number, line in enumerate(lines_of(file), 1):
        if not line.strip():
            continue
        place = f"line {number} of {name}"
        custom_id = batch_line(line, place).custom_id
        if custom_id in seen:
            raise InvalidBatchLine(f"The {place} has the custom_id '{custom_id}' of line {seen[custom_id]}.")
        seen[custom_id] = number
        if len(seen) > MOST_REQUESTS:
            raise InvalidBatchLine(f"There are more than {MOST_REQUESTS} requests in {name}.")
    if not seen:
        raise EmptyData(f"There is no request in {name}.")
    return "batch"
