"""How an error looks on the wire: one renderer, three dialects.

Everywhere: {"error", "error_code", "message", "detail", "details", "timestamp", "status"}, which holds the fields of
every API that Forgearr unites. Under /v1, as OpenAI's clients want it: {"error": {"message", "type", "param", "code"}}.
At Ollama's paths, whose clients show `error` to people, that is the sentence.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from http import HTTPStatus
from typing import Any, Literal

import orjson
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError, WebSocketRequestValidationError
from pydantic import BaseModel, Field
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import Scope
from starlette.websockets import WebSocket, WebSocketState

from cluster import errors
from cluster.db import now
from cluster.errors import ForgearrError, RateLimitExceeded, UnprocessableRequest
from cluster.times import UtcTime

OPENAI_PREFIX = "/v1/"
OLLAMA_PATHS = {
    "/api/chat",
    "/api/generate",
    "/api/embed",
    "/api/embeddings",
    "/api/tags",
    "/api/show",
    "/api/ps",
    "/api/version",
    "/api/create",
    "/api/copy",
    "/api/delete",
    "/api/pull",
    "/api/push",
}
OLLAMA_BLOBS = "/api/blobs/"
OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
SECRET_FIELD = re.compile(r"password|secret|token|key|credential", re.IGNORECASE)
REFERENCE = "#/components/schemas/{model}"
STATUSES = (400, 401, 403, 404, 409, 413, 422, 429, 500, 503)
INTERNAL_CLOSE_CODE = 1011
KINDS: dict[int, type[ForgearrError]] = {
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


class ErrorEnvelope(BaseModel):
    error: str = Field(description="What went wrong, as a word.", examples=["not_found"])
    error_code: str = Field(description="The same, more exactly.", examples=["JOB_NOT_FOUND"])
    message: str = Field(description="What went wrong, as a sentence for people.")
    detail: str = Field(description="The same sentence.")
    details: dict[str, Any] = Field(description="What concerns single fields, by their names.")
    timestamp: UtcTime
    status: Literal["error"]


class RateLimitEnvelope(ErrorEnvelope):
    retry_after: int = Field(description="Seconds until the next request is allowed.")


class OpenAIError(BaseModel):
    message: str
    type: str = Field(examples=["invalid_request_error"])
    param: str | None
    code: str | None


class OpenAIErrorEnvelope(BaseModel):
    error: OpenAIError
    detail: str


class OpenAIRateLimitEnvelope(OpenAIErrorEnvelope):
    retry_after: int


Responses = dict[int | str, dict[str, Any]]


def _declared(envelope: type[BaseModel], rate_limited: type[BaseModel]) -> Responses:
    """By reference: FastAPI would make a field of each model for each status of each route, which takes a second."""

    def response(status: int) -> dict[str, Any]:
        shown = rate_limited if status == HTTPStatus.TOO_MANY_REQUESTS else envelope
        schema = {"$ref": REFERENCE.format(model=shown.__name__)}
        return {"description": HTTPStatus(status).phrase, "content": {"application/json": {"schema": schema}}}

    return {status: response(status) for status in STATUSES}


ERROR_RESPONSES = _declared(ErrorEnvelope, RateLimitEnvelope)
"""What OpenAPI says about errors, for every route."""
OPENAI_ERROR_RESPONSES = _declared(OpenAIErrorEnvelope, OpenAIRateLimitEnvelope)
"""The same for routers under /v1: `APIRouter(responses=OPENAI_ERROR_RESPONSES)`."""


def error_response(error: ForgearrError, path: str) -> Response:
    """The error, in the dialect that is spoken at this path."""
    envelope = _openai_envelope(error) if path.startswith(OPENAI_PREFIX) else _envelope(error)
    if path in OLLAMA_PATHS or path.startswith(OLLAMA_BLOBS):
        envelope["error"] = error.message
    headers: dict[str, str] = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, RateLimitExceeded):
        envelope["retry_after"] = error.retry_after
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = orjson.dumps(envelope, default=str, option=orjson.OPT_UTC_Z)
    return Response(body, error.status, headers, "application/json")


def handle_errors(app: FastAPI) -> None:
    """Make the application answer every error that a route raises with the envelope, and describe it."""
    for kind in (ForgearrError, RequestValidationError, WebSocketRequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answer)
    described = app.openapi

    def openapi() -> dict[str, Any]:
        document = described()
        document["components"]["schemas"] |= _schemas()
        return document

    app.openapi = openapi


@cache
def _schemas() -> dict[str, Any]:
    envelopes = (ErrorEnvelope, RateLimitEnvelope, OpenAIErrorEnvelope, OpenAIRateLimitEnvelope)
    sent: list[tuple[type[BaseModel], JsonSchemaMode]] = [(envelope, "serialization") for envelope in envelopes]
    return models_json_schema(sent, ref_template=REFERENCE)[1]["$defs"]


def as_forgearr_error(error: Exception) -> ForgearrError:
    """What a door says of an exception; of one that nobody expected, only that it happened."""
    if isinstance(error, ForgearrError):
        return error
    if isinstance(error, RequestValidationError | WebSocketRequestValidationError):
        return _invalid_fields(error.errors())
    if isinstance(error, HTTPException):
        return _http_error(error)
    return ForgearrError()


def route_template(scope: Scope) -> str | None:
    """The path of the route that was found, as it was declared, with the prefixes of the routers around it."""
    route = scope.get("fastapi", {}).get("effective_route_context") or scope.get("route")
    return getattr(route, "path", None)


async def _answer(connection: HTTPConnection, error: Exception) -> Any:
    known = as_forgearr_error(error)
    if isinstance(connection, WebSocket):
        return await _refuse_socket(connection, known)
    response = error_response(known, connection.scope["path"])
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


def _envelope(error: ForgearrError) -> dict[str, Any]:
    return {
        "error": error.error,
        "error_code": error.code,
        "message": error.message,
        "detail": error.message,
        "details": error.details,
        "timestamp": now(),
        "status": "error",
    }


def _openai_envelope(error: ForgearrError) -> dict[str, Any]:
    fallback = "server_error" if error.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": error.message,
            "type": OPENAI_TYPES.get(error.status, fallback),
            "param": next(iter(error.details), None) if isinstance(error, UnprocessableRequest) else None,
            "code": error.code.lower(),
        },
        "detail": error.message,
    }


def _invalid_fields(problems: Sequence[Mapping[str, Any]]) -> UnprocessableRequest:
    details = {_field(problem): _reason(problem) for problem in problems}
    sentence = "; ".join(f"{field}: {reason}" for field, reason in details.items())
    return UnprocessableRequest(f"The request is not valid: {sentence}.", details=details)


def _field(problem: Mapping[str, Any]) -> str:
    """`items.0.name` for ("body", "items", 0, "name"); the place itself if nothing in it is named."""
    place, *names = problem["loc"]
    return ".".join(str(name) for name in names) or str(place)


def _reason(problem: Mapping[str, Any]) -> str:
    # A check of our own may quote the value that it refuses.
    if problem["type"] in {"value_error", "assertion_error"} and SECRET_FIELD.search(_field(problem)):
        return "is not valid"
    return str(problem["msg"]).removeprefix("Value error, ").rstrip(".")


def _http_error(error: HTTPException) -> ForgearrError:
    """An error that the framework raised, such as for a route or method that does not exist."""
    phrase = HTTPStatus(error.status_code).phrase
    message = None if error.detail == phrase else error.detail
    if kind := KINDS.get(error.status_code):
        return kind(message)
    answer = ForgearrError(message or f"{phrase}.")
    answer.status = error.status_code
    answer.error = phrase.lower().replace(" ", "_")
    answer.code = answer.error.upper()
    return answer
