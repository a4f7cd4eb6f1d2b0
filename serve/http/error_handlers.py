"""Exception handlers: turn every error into a response in the envelope of its API."""

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError, WebSocketRequestValidationError
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.websockets import WebSocket, WebSocketState

from cluster import errors
from cluster.db import DatabaseUnavailable, is_transient
from cluster.errors import ForgearrError, UnprocessableRequest
from cluster.files.disk import DiskFull, has_filled
from serve.http.errors import (
    SCHEMA_REFERENCE,
    SECRET_FIELD,
    ErrorEnvelope,
    OpenAIErrorEnvelope,
    OpenAIRateLimitEnvelope,
    RateLimitEnvelope,
    error_response,
    route_template,
)
from serve.http.mounts import marks_of

INTERNAL_CLOSE_CODE = 1011
MAX_NAMED_FIELDS = 20
"""A response names this many invalid fields, and counts the rest."""

ERROR_BY_STATUS: dict[int, type[ForgearrError]] = {
    kind.status: kind
    for kind in (
        errors.InvalidRequest,
        errors.Unauthenticated,
        errors.Forbidden,
        errors.NotFound,
        errors.Conflict,
        errors.UnprocessableRequest,
        errors.Unavailable,
    )
}
"""Forgearr's errors for those of the framework, by status."""

logger = logging.getLogger(__name__)


def handle_errors(app: FastAPI) -> None:
    """Register the handlers, and add the envelopes to the OpenAPI document."""
    for kind in (ForgearrError, RequestValidationError, WebSocketRequestValidationError, HTTPException):
        app.add_exception_handler(kind, _handle_error)
    app.add_exception_handler(SQLAlchemyError, _handle_foreign_error)
    app.add_exception_handler(OSError, _handle_foreign_error)
    original_openapi = app.openapi

    def openapi() -> dict[str, Any]:
        document = original_openapi()
        document["components"]["schemas"] |= _schemas()
        return document

    app.openapi = openapi


@cache
def _schemas() -> dict[str, Any]:
    envelopes = (ErrorEnvelope, RateLimitEnvelope, OpenAIErrorEnvelope, OpenAIRateLimitEnvelope)
    sent: list[tuple[type[BaseModel], JsonSchemaMode]] = [(envelope, "serialization") for envelope in envelopes]
    return models_json_schema(sent, ref_template=SCHEMA_REFERENCE)[1]["$defs"]


def as_forgearr_error(error: Exception) -> ForgearrError:
    """The public error for an exception. An unexpected one becomes a general error without details."""
    if isinstance(error, ForgearrError):
        return error
    if isinstance(error, RequestValidationError | WebSocketRequestValidationError):
        return _invalid_fields(error.errors())
    if isinstance(error, HTTPException):
        return _http_error(error)
    if has_filled(error):
        logger.warning("A disk is full: %s", getattr(error, "orig", error))
        return DiskFull()
    if isinstance(error, SQLAlchemyError) and is_transient(error):
        # Not the error itself: it may quote the values of a statement.
        logger.warning("The database does not respond: %s", getattr(error, "orig", None) or type(error).__name__)
        return DatabaseUnavailable()
    return ForgearrError()


async def _handle_foreign_error(connection: HTTPConnection, error: Exception) -> Any:
    """Handle the error of a database or a disk."""
    if has_filled(error) or (isinstance(error, SQLAlchemyError) and is_transient(error)):
        return await _handle_error(connection, error)
    raise error  # a fault in Forgearr, which the outermost middleware logs


async def _handle_error(connection: HTTPConnection, error: Exception) -> Any:
    api_error = as_forgearr_error(error)
    if isinstance(connection, WebSocket):
        return await _refuse_socket(connection, api_error)
    response = error_response(api_error, marks_of(connection.scope).envelope)
    if isinstance(error, HTTPException):
        response.headers.update(error.headers or {})
        if error.status_code == 405 and (methods := _methods(connection)):
            response.headers["Allow"] = ", ".join(methods)
    return response


def _methods(connection: HTTPConnection) -> list[str]:
    """All methods of a path. FastAPI has a route for each method, and reports the first one only."""
    declared = (route_template(connection.scope) or "").replace(":path}", "}")
    operations = connection.app.openapi()["paths"].get(declared, {})
    return sorted(method.upper() for method in operations)


async def _refuse_socket(socket: WebSocket, error: ForgearrError) -> None:
    """Refuse a handshake with an HTTP status if the server supports it, and an open socket with a close code."""
    if socket.client_state == WebSocketState.CONNECTING and "websocket.http.response" in socket.scope["extensions"]:
        return await socket.send_denial_response(error_response(error, marks_of(socket.scope).envelope))
    code = INTERNAL_CLOSE_CODE if error.status >= 500 else 4000 + error.status
    await socket.close(code, error.message[:120])


def _invalid_fields(problems: Sequence[Mapping[str, Any]]) -> UnprocessableRequest:
    details = {_field(problem): _reason(problem) for problem in problems[:MAX_NAMED_FIELDS]}
    sentence = "; ".join(f"{field}: {reason}" for field, reason in details.items())
    more = f"; and {len(problems) - MAX_NAMED_FIELDS} more" if len(problems) > MAX_NAMED_FIELDS else ""
    return UnprocessableRequest(f"The request is not valid: {sentence}{more}.", details=details)


def _field(problem: Mapping[str, Any]) -> str:
    """`items.0.name` for ("body", "items", 0, "name"); the first part if it is the only one."""
    location, *names = problem["loc"]
    return ".".join(str(name) for name in names) or str(location)


def _reason(problem: Mapping[str, Any]) -> str:
    # A validator of Forgearr may quote the rejected value.
    if problem["type"] in {"value_error", "assertion_error"} and SECRET_FIELD.search(_field(problem)):
        return "is not valid"
    return str(problem["msg"]).removeprefix("Value error, ").rstrip(".")


def _http_error(error: HTTPException) -> ForgearrError:
    """Convert an error of the framework, such as an unknown route or method."""
    phrase = HTTPStatus(error.status_code).phrase
    message = None if error.detail == phrase else error.detail
    if kind := ERROR_BY_STATUS.get(error.status_code):
        return kind(message)
    converted = ForgearrError(message or f"{phrase}.")
    converted.status = error.status_code
    converted.error = phrase.lower().replace(" ", "_")
    converted.code = converted.error.upper()
    return converted
