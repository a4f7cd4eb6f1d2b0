"""Executes one line of a batch: validates and answers it as the route of its endpoint does."""

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

from cluster.db import Database, is_transient
from cluster.errors import ForgearrError, InvalidRequest, Unavailable
from cluster.ownership import Principal
from jobs.retry_policy import backoff
from serve.engines.protocol import Engine, EngineLost
from serve.http.error_handlers import as_forgearr_error
from serve.http.errors import error_response
from serve.http.schemas import StrictModel
from serve.models.resolver import ModelResolver, ResolvedModel
from serve.openai.chat import complete_chat
from serve.openai.chat_schemas import ChatRequest
from serve.openai.completions import CompletionRequest, complete_prompts
from serve.openai.embeddings import EmbeddingRequest, compute_embeddings
from serve.openai.files.validation import BatchLine
from serve.openai.responses.request import ResponseRequest
from serve.openai.responses.routes import complete_response

MAX_ENGINE_LOSSES = 3
"""After so many losses of its engine a line fails: it may be what crashes the engine."""
MAX_BACKOFF_ATTEMPT = 5
"""From this attempt on, the wait no longer doubles."""
TRANSIENT_ERRORS = (Unavailable, SQLAlchemyError)

log = logging.getLogger(__name__)


class StreamInBatch(InvalidRequest):
    """Requests of a batch cannot have stream."""

    code = "STREAM_IN_BATCH"


@dataclass(frozen=True)
class LineResult:
    """The outcome of one request: a line for the output file or the error file."""

    number: int  # of the line in the input file
    line: bytes
    succeeded: bool
    usage: dict[str, Any] | None = None


class LineRunner:
    def __init__(self, database: Database, engine: Engine, principal: Principal) -> None:
        self._database = database
        self._engine = engine
        self._principal = principal
        self._models = ModelResolver(lambda: database)

    async def run(self, number: int, line: BatchLine) -> LineResult:
        """Execute one request. Transient errors are retried without a limit of time; the caller may cancel it."""
        losses = 0
        for attempt in count(1):
            try:
                return _line_result(number, line, 200, await self._answer(line))
            except TRANSIENT_ERRORS as error:
                losses += isinstance(error, EngineLost)
                if losses > MAX_ENGINE_LOSSES or (isinstance(error, SQLAlchemyError) and not is_transient(error)):
                    return _failed_result(number, line, error)
                await asyncio.sleep(backoff(min(attempt, MAX_BACKOFF_ATTEMPT)))
            except Exception as error:
                return _failed_result(number, line, error)
        raise AssertionError("there is always another attempt")

    async def _answer(self, line: BatchLine) -> dict[str, Any]:
        body = _parse_body(line)
        model = await self._models.resolve(body.model, self._principal)
        return await self._complete(body, model)

    def _complete(self, body: Any, model: ResolvedModel) -> Awaitable[dict[str, Any]]:
        if isinstance(body, ResponseRequest):
            return complete_response(self._database, self._engine, model, body, self._principal)
        handlers: dict[type, Callable[..., Awaitable[dict[str, Any]]]] = {
            ChatRequest: complete_chat,
            CompletionRequest: complete_prompts,
            EmbeddingRequest: compute_embeddings,
        }
        return handlers[type(body)](self._engine, model, body)


SCHEMAS: dict[str, type[StrictModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/responses": ResponseRequest,
}


def expired_result(number: int, line: BatchLine) -> LineResult:
    error = {"code": "batch_expired", "message": "The batch expired before this request was executed."}
    return LineResult(number, _serialize(line, None, error), False)


def _parse_body(line: BatchLine) -> Any:
    try:
        body: Any = SCHEMAS[line.url].model_validate(line.body)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        raise RequestValidationError([{**item, "loc": ("body", *item["loc"])} for item in errors]) from None
    if getattr(body, "stream", None):
        raise StreamInBatch()
    return body


def _failed_result(number: int, line: BatchLine, error: Exception) -> LineResult:
    if not isinstance(error, ForgearrError | RequestValidationError):
        log.error("line %d of a batch failed", number, exc_info=error)
    api_error = as_forgearr_error(error)
    return _line_result(number, line, api_error.status, orjson.loads(bytes(error_response(api_error, "openai").body)))


def _line_result(number: int, line: BatchLine, status: int, body: dict[str, Any]) -> LineResult:
    response = {"status_code": status, "request_id": token_hex(16), "body": body}
    return LineResult(number, _serialize(line, response, None), status == 200, body.get("usage"))


def _serialize(line: BatchLine, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    output = {"id": f"batch_req_{token_hex(12)}", "custom_id": line.custom_id, "response": response, "error": error}
    return orjson.dumps(output, option=orjson.OPT_APPEND_NEWLINE)
