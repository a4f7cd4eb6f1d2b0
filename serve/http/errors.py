"""Renders an error as a response: one function, three envelopes.

- `native`: {"error", "error_code", "message", "detail", "details", "timestamp", "status"}.
- `openai`: {"error": {"message", "type", "param", "code"}, "detail"}.
- `ollama`: as `native`, but `error` is the message, because Ollama's clients show that field.
"""

import re
from http import HTTPStatus
from typing import Any, Literal

import orjson
from pydantic import BaseModel, Field
from starlette.responses import Response
from starlette.types import Scope

from cluster.db import now
from cluster.errors import ForgearrError, RateLimitExceeded, UnprocessableRequest
from cluster.times import UtcTime

Envelope = Literal["native", "openai", "ollama"]
OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
SECRET_FIELD = re.compile(r"password|secret|token|key|credential", re.IGNORECASE)
SCHEMA_REFERENCE = "#/components/schemas/{model}"
STATUSES = (400, 401, 403, 404, 409, 413, 422, 429, 500, 503)


class ErrorEnvelope(BaseModel):
    error: str = Field(description="Type of the error.", examples=["not_found"])
    error_code: str = Field(description="Code of the error.", examples=["JOB_NOT_FOUND"])
    message: str = Field(description="Description of the error for people.")
    detail: str = Field(description="Same as message.")
    details: dict[str, Any] = Field(description="Errors of single fields, by name, or other details.")
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


def _responses_for(envelope: type[BaseModel], rate_limited: type[BaseModel]) -> Responses:
    """Refer to the schemas. With models, FastAPI would create a field for each status of each route: a second more."""

    def response(status: int) -> dict[str, Any]:
        model = rate_limited if status == HTTPStatus.TOO_MANY_REQUESTS else envelope
        schema = {"$ref": SCHEMA_REFERENCE.format(model=model.__name__)}
        return {"description": HTTPStatus(status).phrase, "content": {"application/json": {"schema": schema}}}

    return {status: response(status) for status in STATUSES}


_NATIVE_RESPONSES = _responses_for(ErrorEnvelope, RateLimitEnvelope)
ERROR_RESPONSES: dict[Envelope, Responses] = {
    "native": _NATIVE_RESPONSES,
    "openai": _responses_for(OpenAIErrorEnvelope, OpenAIRateLimitEnvelope),
    "ollama": _NATIVE_RESPONSES,
}
"""The error responses in OpenAPI."""


def error_response(error: ForgearrError, envelope: Envelope) -> Response:
    content = _openai_envelope(error) if envelope == "openai" else _native_envelope(error)
    if envelope == "ollama":
        content["error"] = error.message
    headers: dict[str, str] = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, RateLimitExceeded):
        content["retry_after"] = error.retry_after
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = orjson.dumps(content, default=str, option=orjson.OPT_UTC_Z)
    return Response(body, error.status, headers, "application/json")


def route_template(scope: Scope) -> str | None:
    """The declared path of the matched route, with the prefixes of its routers."""
    route = scope.get("fastapi", {}).get("effective_route_context") or scope.get("route")
    return getattr(route, "path", None)


def _native_envelope(error: ForgearrError) -> dict[str, Any]:
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
