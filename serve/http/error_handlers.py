"""Every error as a response in its API's envelope."""

from collections.abc import Mapping, Sequence
from functools import cache
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError, WebSocketRequestValidationError
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.websockets import WebSocket, WebSocketState

from cluster import errors
from cluster.errors import ForgearrError, UnprocessableRequest
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

INTERNAL_CLOSE_CODE = 1011
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
"""What the framework's own errors become, by their status."""


def handle_errors(app: FastAPI) -> None:
    """Make the application answer every error that a route raises with the envelope, and describe it."""
    for kind in (ForgearrError, RequestValidationError, WebSocketRequestValidationError, HTTPException):
        app.add_exception_handler(kind, _handle_error)
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
    """What a door says of an exception; of one that nobody expected, only that it happened."""
    if isinstance(error, ForgearrError):
        return error
    if isinstance(error, RequestValidationError | WebSocketRequestValidationError):
        return _invalid_fields(error.errors())
    if isinstance(error, HTTPException):
        return _http_error(error)
    return ForgearrError()


async def _handle_error(connection: HTTPConnection, error: Exception) -> Any:
    api_error = as_forgearr_error(error)
    if isinstance(connection, WebSocket):
        return await _refuse_socket(connection, api_error)
    response = error_response(api_error, connection.scope["path"])
    if isinstance(error, HTTPException):
        response.headers.update(error.headers or {})
        if error.status_code == 405 and (methods := _methods(connection)):
            response.headers["Allow"] = ", ".join(methods)
    return response


def _methods(connection: HTTPConnection) -> list[str]:
    """All methods of an address: FastAPI has a route for each of them, and names only those of the first."""
    declared = (route_template(connection.scope) or "").replace(":path}", "}")
    operations = connection.app.openapi()["paths"].get(declared, {})
    return sorted(method.upper() for method in operations)


async def _refuse_socket(socket: WebSocket, error: ForgearrError) -> None:
    """A handshake is refused with an HTTP status where the server can do so; a running talk with a close code."""
    if socket.client_state == WebSocketState.CONNECTING and "websocket.http.response" in socket.scope["extensions"]:
        return await socket.send_denial_response(error_response(error, socket.scope["path"]))
    code = INTERNAL_CLOSE_CODE if error.status >= 500 else 4000 + error.status
    await socket.close(code, error.message[:120])


def _invalid_fields(problems: Sequence[Mapping[str, Any]]) -> UnprocessableRequest:
    details = {_field(problem): _reason(problem) for problem in problems}
    sentence = "; ".join(f"{field}: {reason}" for field, reason in details.items())
    return UnprocessableRequest(f"The request is not valid: {sentence}.", details=details)


def _field(problem: Mapping[str, Any]) -> str:
    """`items.0.name` for ("body", "items", 0, "name"); the place itself if nothing in it is named."""
    location, *names = problem["loc"]
    return ".".join(str(name) for name in names) or str(location)


def _reason(problem: Mapping[str, Any]) -> str:
    # A check of our own may quote the value that it refuses.
    if problem["type"] in {"value_error", "assertion_error"} and SECRET_FIELD.search(_field(problem)):
        return "is not valid"
    return str(problem["msg"]).removeprefix("Value error, ").rstrip(".")


def _http_error(error: HTTPException) -> ForgearrError:
    """An error that the framework raised, such as for a route or method that does not exist."""
    phrase = HTTPStatus(error.status_code).phrase
    message = None if error.detail == phrase else error.detail
    if kind := ERROR_BY_STATUS.get(error.status_code):
        return kind(message)
    answer = ForgearrError(message or f"{phrase}.")
    answer.status = error.status_code
    answer.error = phrase.lower().replace(" ", "_")
    answer.code = answer.error.upper()
    return answer
