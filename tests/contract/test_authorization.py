"""Authorization: every operation of the OpenAPI document, with every kind of credential.

The access marks of the routes are compared with their responses.
"""

from collections.abc import AsyncIterator
from datetime import timedelta
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute, APIWebSocketRoute
from pwdlib import PasswordHash
from starlette.types import Message

from cluster import identity, ownership
from cluster.db import Database, now
from cluster.files import store as file_store
from cluster.files import uploads as file_uploads
from cluster.secrets import signing_key
from cluster.settings import get_settings
from jobs import queue, schedules
from pipelines.guardian.feedback import store as feedback_store
from pipelines.guardian.repositories import Repository
from pipelines.training.data import content as data_content
from pipelines.training.data import datasets, prompts, resolution
from pipelines.training.sessions import TrainingSession
from serve.app import create_app
from serve.http.marks import Access, access_of
from serve.http.mounts import methods_of
from serve.openai.batches.store import Batch
from serve.openai.responses import store as response_store
from serve.openai.responses.events import ResponseStream
from serve.openai.responses.request import ResponseRequest
from serve.routes import MOUNTS

PASSWORD = "correct horse battery"
PROMPT = {"name": "Lights", "user_input": "Are the lights on?", "expected_output": "Yes."}
FEEDBACK = {"target": "agent_message", "target_id": "msg_1", "rating": "down"}
LEARN = {"data": {"dataset": "demo/homelab"}}


def marked(access: Access, *, sockets: bool = False) -> set[str]:
    """The operations, or the paths of WebSockets, whose routes have this access mark."""
    routes = [route for mount in MOUNTS for route in mount.routes if access_of(route) == access]
    if sockets:
        return {route.path for route in routes if isinstance(route, APIWebSocketRoute)}
    documented = [route for route in routes if isinstance(route, APIRoute) and route.include_in_schema]
    return {f"{method} {route.path_format}" for route in documented for method in methods_of(route)}


PUBLIC = marked("public")
"""They ignore credentials, even wrong ones: health and metrics must respond when the database does not, and a client
that logs in or refreshes often still sends its expired access token."""

ADMIN_ONLY = marked("registration")
"""403 for users and for anonymous callers, since only an administrator's credential helps."""

FOR_ADMINISTRATORS = marked("admin")
"""403 for users and 401 for anonymous callers, who may be administrators."""

SIGNED = marked("signed")
"""They check a signature and no credential. Without a signature everybody gets 401."""

WITHOUT_OWNER = (
    "/api/v1/models/",
    "/v1/models/",
    "/api/blobs/",
    "/api/services/",
    "/health/",
    "/api/v1/shows/",
    "/api/v1/movies/",
    "/api/v1/downloads/",
    "/api/v1/mcp/",
    "/api/v1/config/",
    "/api/servers/",
    "/api/app-server/",
    "/api/storage-server/",
)
"""Paths with these prefixes name no row with an owner. For models see tests/security/api/test_api1_models.py."""

OWNED_LISTS = (
    "/api/v1/jobs",
    "/api/v1/schedules",
    "/api/v1/datasets",
    "/api/training/prompts",
    "/api/training/sessions",
    "/api/v1/feedback",
)

OPENAI_LISTS = ("/v1/files", "/v1/fine_tuning/jobs", "/v1/batches")

SOCKETS = marked("user", sockets=True)
ADMIN_SOCKETS = marked("admin", sockets=True)

Headers = dict[str, str]
Statuses = dict[str, int]


class GuardedServer:
    """A server that requires credentials, and users who have some."""

    def __init__(self, app: FastAPI, client: httpx.AsyncClient) -> None:
        self.app = app
        self.client = client
        self.users: dict[str, identity.User] = {}
        self.keys: dict[str, Headers] = {}
        self.ids: dict[str, str] = {}

    def credentials(self, name: str) -> tuple[Headers, Headers]:
        return self.keys[name], self.bearer(name)

    def bearer(self, name: str) -> Headers:
        return {"Authorization": f"Bearer {identity.create_access_token(self.users[name])}"}

    async def log_in(self, name: str) -> dict[str, str]:
        login = {"email": f"{name}@example.com", "password": PASSWORD}
        response = await self.client.post("/api/v1/auth/login", json=login)
        assert response.status_code == 200, response.text
        return response.json()

    async def body_of(self, operation: str) -> dict[str, Any] | None:
        """A valid body of the operation."""
        match operation:
            case "POST /api/v1/auth/login":
                return {"email": "owner@example.com", "password": PASSWORD}
            case "POST /api/v1/auth/refresh" | "POST /api/v1/auth/logout":
                return {"refresh_token": (await self.log_in("owner"))["refresh_token"]}
            case "POST /api/v1/auth/register":
                return {"email": "new@example.com", "username": "new", "password": PASSWORD}
            case "POST /api/v1/auth/keys":
                return {"name": "another"}
            case "POST /api/v1/jobs":
                return {"kind": "probe"}
            case "POST /api/v1/models/{name}/deploy":
                return {"version": 1}
            case "PATCH /api/v1/models/{name}/versions/{version}":
                return {"visibility": "shared"}
            case "POST /api/v1/schedules" | "PUT /api/v1/schedules/{schedule_id}":
                return {"name": "another", "kind": "probe", "cron": "0 3 * * *"}
            case "POST /api/training/prompts" | "PUT /api/training/prompts/{prompt_id}":
                return PROMPT
            case "POST /api/v1/feedback":
                return FEEDBACK
            case "POST /api/training/prompts/from-feedback":
                return {"rating": "up"}
            case "POST /v1/retrain":
                return {"repository": "none"}
            case "POST /api/training/sessions" | "PUT /api/training/sessions/{session_id}":
                return {"name": "another"}
            case "POST /api/training/sessions/{session_id}/start":
                return LEARN
            case "POST /v1/fine_tuning/jobs":
                return {"model": "forgearr/tiny", "training_file": self.ids["file_id"]}
            case "POST /v1/uploads":
                return {"filename": "a.txt", "purpose": "user_data", "bytes": 1, "mime_type": "text/plain"}
            case "POST /v1/uploads/{upload_id}/complete":
                return {"part_ids": ["part_1"]}
            case "POST /v1/batches":
                return {
                    "input_file_id": self.ids["file_id"],
                    "endpoint": "/v1/embeddings",
                    "completion_window": "24h",
                }
            case "POST /v1/responses":
                return {"model": "forgearr/tiny", "input": "Hello"}
            case "POST /api/v1/repos":
                return {"name": "another", "url": "https://git.example/another"}
            case "PATCH /api/v1/repos/{repository}":
                return {"auto_deploy": False}
            case "POST /api/services":
                return {"name": "TV", "type": "sonarr", "url": "http://127.0.0.1:9"}
            case "POST /api/v1/media/scan":
                return {"library_key": "1"}
            case "POST /api/v1/mcp/{server}/call":
                return {"tool": "get_queue"}
            case "PUT /api/v1/recovery/policy":
                return get_settings().recovery.model_dump()
            case "POST /api/v1/recovery/run":
                return {"dry_run": True}
            case "POST /v1/fine-tune":
                return {"project_name": "another", **LEARN}
            case _:
                return None

    async def request_all(self, headers: Headers, *, only_with_id: bool = False) -> Statuses:
        """The status of each operation. Deletions come last."""
        statuses: Statuses = {}
        for operation in sorted(operations(self.app), key=lambda operation: operation.startswith("DELETE")):
            method, path = operation.split(" ")
            if operation in SIGNED or (only_with_id and ("{" not in path or path.startswith(WITHOUT_OWNER))):
                continue
            address = path.format_map(_KnownIds(self.ids))
            body = await self.body_of(operation)
            params = {"wait": 0} if address.startswith(("/validate/", "/deploy/")) else None
            response = await self.client.request(method, address, params=params, json=body, headers=headers)
            statuses[operation] = response.status_code
        return statuses


@pytest.fixture
async def server(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[GuardedServer]:
    """An owner who has one row of each kind; another user, an administrator, and a disabled user."""
    monkeypatch.setenv("FORGEARR_AUTH__REQUIRED", "true")
    monkeypatch.setenv("FORGEARR_AUTH__REGISTRATION", "false")
    monkeypatch.setenv("FORGEARR_LIMITS__ENABLED", "false")
    get_settings.cache_clear()
    app = create_app()
    transport = httpx.ASGITransport(app, client=("192.0.2.1", 40000))
    async with httpx.AsyncClient(transport=transport, base_url="https://api.example") as client:
        server = GuardedServer(app, client)
        for name in ("owner", "other", "admin", "disabled"):
            await _add_account(server, database, name)
        async with database.transaction() as session:
            principal = ownership.Principal(id=server.users["owner"].id, name="owner", is_admin=False)
            job = await queue.enqueue(session, queue.JobRequest(kind="fine_tune", spec=LEARN), principal)
            training = TrainingSession(
                name="House v1", base_model="forgearr/tiny", config={}, owner_id=principal.id, created_by="owner"
            )
            session.add(training)
            await session.flush()
            request = schedules.ScheduleRequest(name="nightly", kind="probe", cron="0 3 * * *")
            schedule = await schedules.create(session, request, principal)
            feedback_request = feedback_store.FeedbackRequest.model_validate({**FEEDBACK, "target_id": "msg_0"})
            feedback, _ = await feedback_store.save(session, feedback_request, principal)
            prompt = await prompts.create(session, prompts.PromptRequest.model_validate(PROMPT), principal)
            upload = await file_uploads.begin(
                session, filename="a.txt", purpose="user_data", size=1, file_seconds=None, principal=principal
            )
            columns = {"name": "handbook", "url": "https://git.example/handbook", "model": "handbook"}
            repository = Repository(**columns, training={}, policy={}, created_by="admin")
            session.add(repository)
            await session.flush()
            key, _ = await identity.create_key(session, server.users["owner"].id, "owner's second")
            await identity.set_active(session, await identity.get_user(session, "disabled@example.com"), False)
        stream = ResponseStream(
            "resp_" + 32 * "a", ResponseRequest(model="forgearr/tiny", input="Hello").request_fields()
        )
        stream.end()
        await response_store.store(database, stream.response, [], principal)
        content = data_content.write_samples(resolution.demo_samples(), tmp_path / "content.jsonl", "test")
        dataset = await datasets.store_dataset(database, "owners", content, {}, principal)
        file = await file_store.create_file(
            database, BytesIO(b"x"), filename="a.txt", purpose="batch", principal=principal
        )
        columns = {"endpoint": "/v1/embeddings", "labels": {}, "owner_id": principal.id, "created_by": "owner"}
        batch = Batch(id="batch_1", job_id=job.id, input_file_id=file.id, expires_at=now(), **columns)
        async with database.transaction() as session:
            session.add(batch)
        server.ids = {
            "job_id": job.id,
            "schedule_id": schedule.id,
            "key_id": key.id,
            "prompt_id": str(prompt.id),
            "dataset_id": dataset.id,
            "file_id": file.id,
            "upload_id": upload.id,
            "session_id": training.id,
            "response_id": stream.response["id"],
            "batch_id": batch.id,
            "repository": repository.id,
            "feedback_id": feedback.id,
        }
        yield server


WRONG_CREDENTIALS = [
    "wrong key",
    "expired key",
    "wrong bearer",
    "foreign token",
    "expired token",
    "refresh token",
    "basic",
]


# Operations


async def test_anonymous_callers_are_refused(server: GuardedServer) -> None:
    statuses = await server.request_all({})
    assert statuses.keys() >= PUBLIC | ADMIN_ONLY
    assert with_status(statuses, 401) == statuses.keys() - PUBLIC - ADMIN_ONLY
    assert with_status(statuses, 403) == ADMIN_ONLY


async def test_a_credential_does_not_replace_a_signature(server: GuardedServer) -> None:
    assert set(operations(server.app)) >= SIGNED
    for headers in ({}, *server.credentials("admin")):
        for operation in SIGNED:
            response = await server.client.post(operation.split()[1].format(provider="github"), headers=headers)
            assert response.status_code == 401


async def test_wrong_credentials_are_refused(server: GuardedServer, database: Database) -> None:
    for kind in WRONG_CREDENTIALS:
        statuses = await server.request_all(await wrong_credential(kind, server, database))
        assert with_status(statuses, 401) == statuses.keys() - PUBLIC, kind


async def test_a_disabled_account_is_refused(server: GuardedServer) -> None:
    for headers in server.credentials("disabled"):
        statuses = await server.request_all(headers)
        assert with_status(statuses, 403) == statuses.keys() - PUBLIC


async def test_a_user_may_call_everything_not_for_administrators(server: GuardedServer) -> None:
    for headers in server.credentials("owner"):
        statuses = await server.request_all(headers)
        assert (with_status(statuses, 401), with_status(statuses, 403)) == (set(), ADMIN_ONLY | FOR_ADMINISTRATORS)


async def test_an_administrator_may_call_everything(server: GuardedServer) -> None:
    for headers in server.credentials("admin"):
        assert with_status(await server.request_all(headers), 401, 403) == set()


async def test_public_operations_work_with_any_credential(server: GuardedServer, database: Database) -> None:
    for headers in ({}, server.keys["disabled"], await wrong_credential("expired token", server, database)):
        statuses = await server.request_all(headers)
        assert {operation: statuses[operation] for operation in PUBLIC if statuses[operation] >= 300} == {}


# Ownership


async def test_rows_of_other_users_are_not_found(server: GuardedServer) -> None:
    statuses = await server.request_all(server.bearer("other"), only_with_id=True)
    assert {path.split("{")[1].split("}")[0] for path in statuses} == server.ids.keys()
    # Operations for administrators do not reveal either whether a row exists.
    assert with_status(statuses, 403) == statuses.keys() & FOR_ADMINISTRATORS
    assert with_status(statuses, 404) == statuses.keys() - FOR_ADMINISTRATORS
    # The rows are unchanged for their owner.
    as_owner = await server.request_all(server.bearer("owner"), only_with_id=True)
    assert with_status(as_owner, 404) == set()


async def test_lists_contain_only_the_callers_rows(server: GuardedServer) -> None:
    for name, count in (("owner", 1), ("other", 0), ("admin", 1)):
        for path in OWNED_LISTS:
            page = (await server.client.get(path, headers=server.bearer(name))).json()
            assert (page["total"], len(page["items"])) == (count, count)
        for path in OPENAI_LISTS:
            listed = (await server.client.get(path, headers=server.bearer(name))).json()
            assert len(listed["data"]) == count
    for name, count in (("owner", 2), ("other", 1), ("admin", 1)):
        page = (await server.client.get("/api/v1/auth/keys", headers=server.bearer(name))).json()
        assert page["total"] == count


async def test_a_job_cannot_depend_on_another_users_job(server: GuardedServer) -> None:
    body = {"kind": "probe", "depends_on": [server.ids["job_id"]]}
    refused = await server.client.post("/api/v1/jobs", json=body, headers=server.keys["other"])
    assert (refused.status_code, refused.json()["error_code"]) == (422, "UNKNOWN_DEPENDENCY")
    allowed = await server.client.post("/api/v1/jobs", json=body, headers=server.keys["owner"])
    assert allowed.status_code == 201


async def test_idempotency_keys_are_separate_for_each_user(server: GuardedServer) -> None:
    ids = {
        (
            await server.client.post(
                "/api/v1/jobs", json={"kind": "probe"}, headers={**server.keys[name], "Idempotency-Key": "same"}
            )
        ).json()["id"]
        for name in ("owner", "other", "owner")
    }
    assert len(ids) == 2


async def test_users_cannot_queue_kinds_of_administrators(server: GuardedServer) -> None:
    for name, status in (("owner", 403), ("admin", 201)):
        for path, body in (
            ("/api/v1/jobs", {"kind": "sweep"}),
            ("/api/v1/schedules", {"name": "mine", "kind": "sweep", "cron": "0 3 * * *"}),
        ):
            response = await server.client.post(path, json=body, headers=server.keys[name])
            assert response.status_code == status


# WebSockets


async def test_anonymous_callers_get_no_socket(server: GuardedServer) -> None:
    assert set((await connect_all(server, {})).values()) == {401}


async def test_wrong_credentials_get_no_socket(server: GuardedServer, database: Database) -> None:
    for kind in WRONG_CREDENTIALS:
        statuses = await connect_all(server, await wrong_credential(kind, server, database))
        assert set(statuses.values()) == {401}, kind


async def test_sockets_are_for_users_or_administrators(server: GuardedServer) -> None:
    for headers in server.credentials("disabled"):
        assert set((await connect_all(server, headers)).values()) == {403}
    for headers in server.credentials("owner"):
        statuses = await connect_all(server, headers)
        assert (with_status(statuses, 101), with_status(statuses, 403)) == (SOCKETS, ADMIN_SOCKETS)
    for headers in server.credentials("admin"):
        assert set((await connect_all(server, headers)).values()) == {101}


async def test_a_training_of_another_user_cannot_be_followed(server: GuardedServer) -> None:
    for training_id in (server.ids["session_id"], server.ids["job_id"]):
        for name, status in (("owner", 101), ("other", 404), ("admin", 101)):
            handshake = await _shake_hands(server.app, f"/ws/training/{training_id}", server.bearer(name))
            assert handshake == status


def operations(app: FastAPI) -> list[str]:
    """Every operation of the OpenAPI document: `GET /health`."""
    paths: dict[str, dict[str, Any]] = app.openapi()["paths"]
    return [f"{method.upper()} {path}" for path, methods in paths.items() for method in methods]


def with_status(statuses: Statuses, *expected: int) -> set[str]:
    return {name for name, status in statuses.items() if status in expected}


async def wrong_credential(kind: str, server: GuardedServer, database: Database) -> Headers:
    """An invalid credential of a valid account."""
    user = server.users["owner"]
    claims = jwt.decode(identity.create_access_token(user), signing_key(), algorithms=["HS256"])
    match kind:
        case "wrong key":
            return {"X-API-Key": "fgr_" + "x" * 43}
        case "expired key":
            async with database.transaction() as session:
                _, key = await identity.create_key(session, user.id, "old", now() - timedelta(seconds=1))
            return {"X-API-Key": key}
        case "wrong bearer":
            return {"Authorization": "Bearer fgr_wrong"}
        case "foreign token":
            return {"Authorization": f"Bearer {jwt.encode(claims, 'x' * 32, algorithm='HS256')}"}
        case "expired token":
            expired = claims | {"exp": now() - timedelta(seconds=1)}
            return {"Authorization": f"Bearer {jwt.encode(expired, signing_key(), algorithm='HS256')}"}
        case "refresh token":
            return {"Authorization": f"Bearer {(await server.log_in('owner'))['refresh_token']}"}
        case _:
            return {"Authorization": "Basic b3duZXI6Y29ycmVjdCBob3JzZSBiYXR0ZXJ5"}


async def connect_all(server: GuardedServer, headers: Headers) -> Statuses:
    """The status of a handshake with each WebSocket: 101, or that of the refusal."""
    ids = {"client_id": "client-1", "training_id": server.ids["session_id"]}
    paths = SOCKETS | ADMIN_SOCKETS
    return {path: await _shake_hands(server.app, path.format_map(ids), headers) for path in paths}


async def _shake_hands(app: FastAPI, path: str, headers: Headers) -> int:
    """Connect, and disconnect after the first response."""
    scope = {
        "type": "websocket",
        "path": path,
        "scheme": "wss",
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "client": ("192.0.2.1", 40000),
        "extensions": {"websocket.http.response": {}},
    }
    incoming = iter([{"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": 1000}])
    sent: list[Message] = []

    async def receive() -> Message:
        return next(incoming)

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return 101 if sent[0]["type"] == "websocket.accept" else sent[0]["status"]


class _KnownIds(dict[str, str]):
    """The known ids. Other parameters get an id that does not exist."""

    def __missing__(self, name: str) -> str:
        return "unknown"


async def _add_account(server: GuardedServer, database: Database, name: str) -> None:
    async with database.transaction() as session:
        user = await identity.add_user(
            session,
            email=f"{name}@example.com",
            username=name,
            password_hash=_password_hash(),
            role="admin" if name == "admin" else "user",
        )
        _, key = await identity.create_key(session, user.id, "test")
    server.users[name], server.keys[name] = user, {"X-API-Key": key}


@cache
def _password_hash() -> str:
    return PasswordHash.recommended().hash(PASSWORD)
