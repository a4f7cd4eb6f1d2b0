"""Error responses, the validation of input, and the id of every response."""

import errno
import json
import logging
import sqlite3
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from pydantic import BaseModel, Field, TypeAdapter, field_validator
from sqlalchemy.exc import OperationalError

from cluster.errors import Conflict, ForgearrError, NotFound, RateLimitExceeded, Unauthenticated, Unavailable
from cluster.logs import request_id
from serve.http.error_handlers import handle_errors
from serve.http.errors import (
    ERROR_RESPONSES,
    ErrorEnvelope,
    OpenAIErrorEnvelope,
    OpenAIRateLimitEnvelope,
    RateLimitEnvelope,
)
from serve.http.marks import access
from serve.http.mounts import Mount, mount_all
from serve.middleware import request_frame, strict_input
from serve.monitoring.metrics import RequestMetrics

ERRORS: list[ForgearrError] = [
    NotFound("There is no service 'plex'."),
    Conflict(),
    Unauthenticated(),
    RateLimitExceeded(30),
    Unavailable(),
]


RAISED: list[Exception] = []
"""What /raise raises."""


class Item(BaseModel):
    name: str
    count: int = Field(default=1, le=10)
    api_key: str | None = None
    data: Any = None

    @field_validator("api_key")
    @classmethod
    def refuse(cls, key: str | None) -> str | None:
        if key == "bad":
            raise ValueError(f"{key} is not a key")
        return key


def build_app() -> FastAPI:
    app = FastAPI(responses=ERROR_RESPONSES["native"])
    openai = APIRouter(prefix="/v1")

    @app.get("/errors/{number}")
    @openai.get("/errors/{number}")
    @access("public")
    async def fail(number: int) -> None:
        raise ERRORS[number]

    @app.post("/items")
    @openai.post("/items")
    @access("public")
    async def create(item: Item) -> Item:
        return item

    @app.get("/items")
    async def list_items() -> list[Item]:
        return []

    @app.get("/raise")
    @openai.get("/raise")
    @access("public")
    async def fail_otherwise() -> None:
        raise RAISED[0]

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("the password is hunter2")

    @app.get("/id")
    async def read_id() -> str | None:
        return request_id.get()

    mount_all(app, [Mount(openai, "Test", "openai")])
    handle_errors(app)
    app.add_middleware(strict_input.InputValidationMiddleware)
    app.add_middleware(request_frame.RequestContextMiddleware, metrics=RequestMetrics())
    return app


@pytest.fixture
async def client(home: object) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(build_app()), base_url="http://127.0.0.1") as client:
        yield client


@pytest.mark.parametrize("number", range(len(ERRORS)))
async def test_every_error_has_the_native_fields(client: httpx.AsyncClient, number: int) -> None:
    error = ERRORS[number]
    response = await client.get(f"/errors/{number}")
    envelope = RateLimitEnvelope if response.status_code == 429 else ErrorEnvelope
    body = envelope.model_validate(response.json())
    assert response.status_code == error.status
    assert (body.error, body.error_code, body.message, body.detail) == (
        error.error,
        error.code,
        error.message,
        error.message,
    )
    assert response.json()["timestamp"].endswith("Z")


@pytest.mark.parametrize(
    ("number", "type_"),
    [
        (0, "not_found_error"),
        (1, "invalid_request_error"),
        (2, "authentication_error"),
        (3, "rate_limit_error"),
        (4, "server_error"),
    ],
)
async def test_errors_under_v1_have_openais_fields(client: httpx.AsyncClient, number: int, type_: str) -> None:
    response = await client.get(f"/v1/errors/{number}")
    envelope = OpenAIRateLimitEnvelope if response.status_code == 429 else OpenAIErrorEnvelope
    body = envelope.model_validate(response.json())
    assert (body.error.type, body.error.message, body.detail) == (
        type_,
        ERRORS[number].message,
        ERRORS[number].message,
    )


async def test_errors_have_the_headers_of_their_status(client: httpx.AsyncClient) -> None:
    limited = await client.get("/errors/3")
    assert (limited.headers["retry-after"], limited.json()["retry_after"]) == ("30", 30)
    assert (await client.get("/errors/2")).headers["www-authenticate"] == "Bearer"


async def test_a_wrong_method_gets_the_allowed_ones(client: httpx.AsyncClient) -> None:
    assert (await client.put("/items")).headers["allow"] == "GET, POST"
    assert (await client.put("/v1/items")).headers["allow"] == "POST"
    assert "GET" in (await client.post("/openapi.json")).headers["allow"]


async def test_an_invalid_field_is_named(client: httpx.AsyncClient) -> None:
    response = await client.post("/items", json={"count": 11})
    body = ErrorEnvelope.model_validate(response.json())
    assert response.status_code == 422
    assert body.error_code == "VALIDATION_ERROR"
    assert set(body.details) == {"name", "count"}
    assert "count: Input should be less than or equal to 10" in body.message


async def test_the_first_invalid_field_under_v1_is_the_param(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/items", json={"name": "a", "count": 11})
    assert OpenAIErrorEnvelope.model_validate(response.json()).error.param == "count"


async def test_the_value_of_a_secret_field_is_never_repeated(client: httpx.AsyncClient) -> None:
    response = await client.post("/items", json={"name": "a", "api_key": "bad"})
    assert response.status_code == 422
    assert response.json()["details"] == {"api_key": "is not valid"}
    assert "bad" not in response.text


async def test_an_unexpected_error_is_logged_and_not_shown(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        response = await client.get("/broken")
    assert response.status_code == 500
    assert ErrorEnvelope.model_validate(response.json()).error == "internal_error"
    assert "hunter2" not in response.text
    assert "RuntimeError: the password is hunter2" in caplog.text
    assert "GET /broken 500" in caplog.text


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("PUT", "/items", 405)])
async def test_errors_of_the_framework_have_the_same_fields(
    client: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    response = await client.request(method, path)
    assert response.status_code == status
    ErrorEnvelope.model_validate(response.json())


@pytest.mark.parametrize(
    "body",
    [
        b'{"name": ',
        b"\xff\xfe{}",
        b'{"name": "\xff"}',
        b'{"name": "a\\u0000"}',
        b'{"name": "a", "data": {"\\u0000": 1}}',
        b'{"name": "a\x00"}',
        b'{"name": "a\\ud800"}',
        b'{"name": "a", "data": NaN}',
        b'{"name": "a", "data": 1e999}',
        b"[" * 100_000,
    ],
)
async def test_a_body_that_cannot_be_stored_is_refused(client: httpx.AsyncClient, body: bytes) -> None:
    response = await client.post("/items", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert ErrorEnvelope.model_validate(response.json()).error == "invalid_request"


@pytest.mark.parametrize("name", ["\\u0000", "emoji 🎬", "new\nline"])
async def test_unusual_text_passes_unchanged(client: httpx.AsyncClient, name: str) -> None:
    response = await client.post("/items", json={"name": name})
    assert (response.status_code, response.json()["name"]) == (200, name)


async def test_nul_in_a_url_is_refused(client: httpx.AsyncClient) -> None:
    assert (await client.get("/id?name=%00")).status_code == 400
    assert (await client.get("/errors/%00")).status_code == 400


async def test_a_too_large_body_is_refused(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    for bound in ("MAX_BODY_BYTES", "MAX_ANONYMOUS_BODY_BYTES"):
        monkeypatch.setattr(strict_input, bound, 1000)
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 100
            yield b" " * 100

    announced = await client.post("/items", content=b" " * 1001)
    assert (announced.status_code, announced.json()["error_code"]) == (413, "BODY_TOO_LARGE")
    streamed = await client.post("/items", content=endless())
    assert streamed.status_code == 413
    assert sent < 2000


async def test_the_request_id_of_a_client_is_used(client: httpx.AsyncClient) -> None:
    response = await client.get("/id", headers={"X-Request-ID": "trace-1.a:b_c"})
    assert response.headers["x-request-id"] == response.json() == "trace-1.a:b_c"


@pytest.mark.parametrize("request_id", ["", "a b", "x" * 129, "<script>"])
async def test_an_invalid_request_id_is_replaced(client: httpx.AsyncClient, request_id: str) -> None:
    response = await client.get("/nothing", headers={"X-Request-ID": request_id})
    assert len(response.headers["x-request-id"]) == 32


async def test_each_request_has_its_own_id(client: httpx.AsyncClient) -> None:
    assert len({(await client.get("/id")).json() for _ in range(5)}) == 5


async def test_openapi_declares_the_envelopes(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    assert "HTTPValidationError" not in document["components"]["schemas"]
    for path, operations in document["paths"].items():
        prefix = "OpenAI" if path.startswith("/v1/") else ""
        for operation in operations.values():
            for status, kind in (("422", "Error"), ("404", "Error"), ("429", "RateLimit"), ("500", "Error")):
                name = f"{prefix}{kind}Envelope"
                schema = operation["responses"][status]["content"]["application/json"]["schema"]
                assert schema == {"$ref": f"#/components/schemas/{name}"}


def test_an_envelope_with_unserializable_details_can_be_sent() -> None:
    from serve.http.errors import error_response

    body = error_response(Conflict(details={"paths": {1}, "when": float("nan")}), "native").body
    TypeAdapter(ErrorEnvelope).validate_python(json.loads(bytes(body)))


# A disk that is full


def sqlite_error(name: str) -> sqlite3.Error:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorname = name
    return error


FULL: list[Exception] = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    OperationalError("INSERT", {"secret": "hunter2"}, sqlite_error("SQLITE_FULL")),
]


@pytest.mark.parametrize("error", FULL, ids=repr)
async def test_a_full_disk_is_507(client: httpx.AsyncClient, error: Exception) -> None:
    RAISED[:] = [error]
    for path, expected in (("/raise", "DISK_FULL"), ("/v1/raise", "disk_full")):
        response = await client.get(path)
        assert response.status_code == 507
        assert expected in response.text
        assert "The disk is full" in response.text
        assert "hunter2" not in response.text


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), PermissionError(13, "/etc/secret")])
async def test_another_failure_of_a_disk_is_500_without_details(client: httpx.AsyncClient, error: Exception) -> None:
    RAISED[:] = [error]
    response = await client.get("/raise")
    assert response.status_code == 500
    assert str(error.args[1]) not in response.text
