"""One line of a batch: checked and answered as the door of its endpoint would do it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count
from secrets import token_hex
from typing import Any

import orjson
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from cluster.db import Database, is_passing
from cluster.errors import ForgearrError, InvalidRequest, Unavailable
from cluster.ownership import Owner
from jobs.retry_policy import backoff
from serve.engines.protocol import Engine, EngineLost
from serve.http.error_handlers import as_forgearr_error
from serve.http.errors import OPENAI_PREFIX, error_response
from serve.http.schemas import Strict
from serve.models.resolver import Meant, Models
from serve.openai.chat import answer_chat
from serve.openai.chat_schemas import ChatRequest
from serve.openai.completions import CompletionRequest, answer_completion
from serve.openai.embeddings import EmbeddingRequest, answer_embeddings
from serve.openai.files.validation import BatchLine
from serve.openai.responses.request import ResponseRequest
from serve.openai.responses.routes import answer_response

MOST_LOSSES = 3
"""How often an engine may be lost over a line: it may be the line that kills it."""
LONGEST_WAIT = 5
"""Of the waits of a job, each twice as long as the one before: the last that doubles here."""
PASSING = (Unavailable, SQLAlchemyError)

log = logging.getLogger(__name__)


class StreamInBatch(InvalidRequest):
    """Nobody listens to a batch: its requests cannot have stream."""

    code = "STREAM_IN_BATCH"


@dataclass(frozen=True)
class Outcome:
    """What a line of the file has come to: a line of the output, or of the errors."""

    number: int
    line: bytes
    succeeded: bool
    usage: dict[str, Any] | None = None


class Answering:
    def __init__(self, database: Database, engine: Engine, owner: Owner) -> None:
        self._database = database
        self._engine = engine
        self._owner = owner
        self._models = Models(lambda: database)

    async def answer(self, number: int, line: BatchLine) -> Outcome:
        """However long that takes: whoever has no more time cancels it."""
        losses = 0
        for attempt in count(1):
            try:
                return _outcome(number, line, 200, await self._answer(line))
            except PASSING as error:
                losses += isinstance(error, EngineLost)
                if losses > MOST_LOSSES or (isinstance(error, SQLAlchemyError) and not is_passing(error)):
                    return _refused(number, line, error)
                await asyncio.sleep(backoff(min(attempt, LONGEST_WAIT)))
            except Exception as error:
                return _refused(number, line, error)
        raise AssertionError("there is always another attempt")

    async def _answer(self, line: BatchLine) -> dict[str, Any]:
        wanted = _checked(line)
        meant = await self._models.resolve(wanted.model, self._owner)
        return await self._work(wanted, meant)

    def _work(self, wanted: Any, meant: Meant) -> Awaitable[dict[str, Any]]:
        if isinstance(wanted, ResponseRequest):
            return answer_response(self._database, self._engine, meant, wanted, self._owner)
        answers: dict[type, Callable[..., Awaitable[dict[str, Any]]]] = {
            ChatRequest: answer_chat,
            CompletionRequest: answer_completion,
            EmbeddingRequest: answer_embeddings,
        }
        return answers[type(wanted)](self._engine, meant, wanted)


SCHEMAS: dict[str, type[Strict]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/responses": ResponseRequest,
}


def expired(number: int, line: BatchLine) -> Outcome:
    error = {"code": "batch_expired", "message": "The batch expired before this request was executed."}
    return Outcome(number, _written(line, None, error), False)


def _checked(line: BatchLine) -> Any:
    try:
        wanted: Any = SCHEMAS[line.url].model_validate(line.body)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        raise RequestValidationError([{**fault, "loc": ("body", *fault["loc"])} for fault in faults]) from None
    if getattr(wanted, "stream", None):
        raise StreamInBatch()
    return wanted


def _refused(number: int, line: BatchLine, error: Exception) -> Outcome:
    if not isinstance(error, ForgearrError | RequestValidationError):
        log.error("line %d of a batch failed", number, exc_info=error)
    known = as_forgearr_error(error)
    return _outcome(number, line, known.status, orjson.loads(bytes(error_response(known, OPENAI_PREFIX).body)))


def _outcome(number: int, line: BatchLine, status: int, body: dict[str, Any]) -> Outcome:
    response = {"status_code": status, "request_id": token_hex(16), "body": body}
    return Outcome(number, _written(line, response, None), status == 200, body.get("usage"))


def _written(line: BatchLine, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    told = {"id": f"batch_req_{token_hex(12)}", "custom_id": line.custom_id, "response": response, "error": error}
    return orjson.dumps(told, option=orjson.OPT_APPEND_NEWLINE)
