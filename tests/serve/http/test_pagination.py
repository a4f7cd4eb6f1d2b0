"""Pagination of all lists: the pages together contain each item once, in order."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from fastapi.dependencies.utils import get_flat_params
from fastapi.routing import APIRoute

from cluster.audit_log import AuditLogEntry
from cluster.db import Base, now
from cluster.files.tables import File
from cluster.identity import ApiKey, User
from cluster.services.health_checks import ServiceCheck
from cluster.services.store import Service
from jobs.registry import find_kind
from jobs.states import State
from jobs.tables import Job, JobEvent, Schedule
from pipelines.guardian.feedback.store import Feedback
from pipelines.guardian.repositories import Repository
from pipelines.media.audit.rules import PRIORITIES
from pipelines.media.audit.tables import Audit, Recommendation
from pipelines.media.downloads.log import Recovery
from pipelines.media.downloads.tables import FollowedDownload
from pipelines.tools.calls import ToolCall
from pipelines.training.data.datasets import Dataset
from pipelines.training.data.prompts import Prompt
from pipelines.training.models import registry
from pipelines.training.models.mlflow_rows import new_model
from pipelines.training.models.versions import Model, Version
from pipelines.training.sessions import TrainingSession
from serve.openai.batches.store import Batch
from serve.openai.responses.store import StoredResponse
from serve.routes import MOUNTS
from tests.support.api_client import LEARN, ApiClient

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
COUNT = 5
CURSORS = {"skip", "page", "after"}
BY = {"created_by": "ada"}
IDENTITY = ("id", "audit_id", "item", "version", "name")
"""The first of these fields that an item has identifies it."""
PARENT = {"job_id": "job_parent", "service_id": 1, "response_id": "resp_1"}
"""The parents of nested lists."""


def job(at: datetime, kind: str = "probe", **columns: Any) -> Job:
    spec = find_kind(kind).validate_spec(LEARN if kind == "fine_tune" else {})
    columns = {"id": f"job_{uuid4().hex}", "run_after": at, "created_at": at, "demand": "", **BY, **columns}
    return Job(kind=kind, spec=spec, state=State.QUEUED, resources={}, max_attempts=1, **columns)


def schedule(at: datetime) -> Schedule:
    return Schedule(id=str(uuid4()), name=uuid4().hex, kind="probe", spec={}, cron="0 3 * * *", timezone="UTC", **BY)


def dataset(at: datetime) -> Dataset:
    content = {"digest": "0" * 64, "samples": 1, "bytes": 1, "address": "datasets/0"}
    return Dataset(id=uuid4().hex, name="homelab", version=1, kind="chat", source={}, created_at=at, **content, **BY)


def repository(at: datetime) -> Repository:
    return Repository(name=uuid4().hex, url="https://git.example/a", model="homelab", training={}, policy={}, **BY)


def recovery(at: datetime) -> Recovery:
    decision = {"decision": "retry", "reason": "It failed.", "policy": {}, "dry_run": True, "outcome": "dry_run"}
    return Recovery(at=at, service="sabnzbd", item="nzo_1", title="A film", job_id="job_1", **decision)


def audit(at: datetime) -> Audit:
    findings: dict[str, Any] = {"summary": {}, "counts": dict.fromkeys(PRIORITIES, 0), "total": 0, "rule_problems": []}
    return Audit(id=uuid4().hex, at=at, services=[], failed={}, web_search={}, **findings, **BY)


def recommendation(at: datetime) -> Recommendation:
    setting = {"area": "host", "setting": "port", "entry": uuid4().hex, "entry_name": ""}
    reasons = {"rationale": "", "explanation": "", "impact": "", "references": [], "sources": []}
    columns = {"rule_id": "a", "category": "security", "priority": "low", "created_at": at, **setting, **reasons}
    return Recommendation(service_id=PARENT["service_id"], **columns)


def file(at: datetime) -> File:
    return File(id=f"file-{uuid4().hex}", purpose="user_data", filename="a.txt", bytes=1, created_at=at, **BY)


def user(at: datetime) -> User:
    name = uuid4().hex
    return User(id=name, email=f"{name}@example.com", username=name, password_hash="-", created_at=at)


def batch(at: datetime) -> list[Base]:
    work = job(at)
    columns = {"endpoint": "/v1/embeddings", "input_file_id": "file-1", "labels": {}, "created_at": at, **BY}
    return [work, Batch(id=f"batch_{uuid4().hex}", job_id=work.id, expires_at=at, **columns)]


def version(name: str) -> Version:
    return Version(name, 1, "run", [], None, "forgearr/tiny", "job_1", "job_2", None, MOMENT)


def log_line(at: datetime) -> JobEvent:
    data = {"level": "INFO", "message": "one step"}
    return JobEvent(job_id=PARENT["job_id"], type="log", data=data, created_at=at)


BY_OFFSET: dict[str, Callable[[datetime], Base]] = {
    "/api/v1/jobs": job,
    "/api/v1/schedules": schedule,
    "/api/training/sessions": lambda at: TrainingSession(
        name="House", base_model="forgearr/tiny", config={}, created_at=at, **BY
    ),
    "/api/v1/feedback": lambda at: Feedback(
        target="agent_message", target_id="msg_1", rating="up", created_at=at, **BY
    ),
    "/api/training/prompts": lambda at: Prompt(name="Lights", user_input="On?", tags=[], created_at=at, **BY),
    "/api/v1/datasets": dataset,
    "/api/v1/repos": repository,
    "/api/services/{service_id}/checks": lambda at: ServiceCheck(
        service_id=PARENT["service_id"], at=at, healthy=True, version=uuid4().hex
    ),
    "/api/v1/mcp/calls": lambda at: ToolCall(
        at=at, called_by="ada", service="sonarr", tool="get_queue", arguments={}, outcome="succeeded"
    ),
    "/api/v1/recovery": recovery,
    "/api/v1/recovery/downloads": lambda at: FollowedDownload(
        service_id=PARENT["service_id"], item=uuid4().hex, title="A film", state="running", moved_at=at
    ),
    "/api/v1/config/audit/history": audit,
    "/api/v1/config/recommendations": recommendation,
}
BY_KEY: dict[str, Callable[[datetime], Base | list[Base]]] = {
    "/v1/files": file,
    "/v1/files?order=asc": file,
    "/v1/batches": batch,
    "/api/v1/audit-log": lambda at: AuditLogEntry(created_at=at, action="login", outcome="succeeded"),
    "/api/v1/usage": user,
    "/v1/fine_tuning/jobs": lambda at: job(at, "fine_tune"),
    "/v1/fine_tuning/jobs/{job_id}/events": log_line,
    "/api/v1/jobs/{job_id}/events": log_line,
    "/api/v1/jobs/{job_id}/logs": log_line,
}
IN_MEMORY = [
    "/api/v1/auth/keys",
    "/api/v1/models",
    "/v1/fine_tuning/jobs/{job_id}/checkpoints",
    "/v1/responses/{response_id}/input_items",
    "/v1/responses/{response_id}/input_items?order=asc",
]


@pytest.fixture
async def lists(api: ApiClient, monkeypatch: pytest.MonkeyPatch) -> ApiClient:
    """The API with the parents of nested lists, and with the lists that are sliced in memory."""
    epochs = [{"step": number, "created_at": MOMENT.isoformat()} for number in range(COUNT)]
    items = [{"id": f"msg_{number}", "type": "message", "role": "user", "content": []} for number in range(COUNT)]
    admin = api.users["admin"].id
    keys = [ApiKey(user_id=admin, name="key", hash=f"{n}", prefix="fgr_", created_at=MOMENT) for n in range(COUNT)]
    async with api.database.transaction() as session:
        session.add(Service(id=PARENT["service_id"], name="TV", type="sonarr", url="http://127.0.0.1:9", **BY))
        session.add(job(MOMENT, "fine_tune", id=PARENT["job_id"], checkpoint={"epochs": epochs}))
        session.add(StoredResponse(id=PARENT["response_id"], given=items, body={"output": []}, bytes=2, **BY))
        session.add_all(keys)

    class Registry:
        async def models(self) -> list[Model]:
            return [new_model([version(f"model-{number}")], None) for number in range(COUNT)]

        async def versions(self, condition: str) -> list[Version]:
            return [version(f"model-{number}") for number in range(COUNT)]

    @asynccontextmanager
    async def connect() -> AsyncGenerator[Registry]:
        yield Registry()

    monkeypatch.setattr(registry, "connect", connect)
    return api


@pytest.mark.parametrize("path", [*BY_OFFSET, *BY_KEY, *IN_MEMORY])
async def test_the_pages_together_are_the_whole_list(lists: ApiClient, path: str) -> None:
    await add(lists, path, COUNT, MOMENT)
    expected = await read_pages(lists, path, 100)
    assert len(expected) == len(set(expected)) >= COUNT
    for size in (2, COUNT):
        assert await read_pages(lists, path, size) == expected


@pytest.mark.parametrize("path", BY_KEY)
async def test_concurrent_inserts_hide_or_repeat_no_row(lists: ApiClient, path: str) -> None:
    await add(lists, path, COUNT, MOMENT)
    expected = await read_pages(lists, path, 100)
    read = await read_pages(lists, path, 2, lambda: add(lists, path, 1, now()))
    assert len(read) == len(set(read))
    assert [item for item in read if item in expected] == expected


def test_every_list_is_tested() -> None:
    routes = [route for mount in MOUNTS for route in mount.routes if isinstance(route, APIRoute)]
    lists = {route.path for route in routes if CURSORS & {param.alias for param in get_flat_params(route.dependant)}}
    assert lists == {path.partition("?")[0] for path in (*BY_OFFSET, *BY_KEY, *IN_MEMORY)}


async def add(api: ApiClient, path: str, count: int, at: datetime) -> None:
    """Add rows with the same time to a list."""
    new_row = {**BY_OFFSET, **BY_KEY}.get(path)
    async with api.database.transaction() as session:
        for _ in range(count if new_row else 0):
            assert new_row is not None
            rows = new_row(at)
            session.add_all(rows if isinstance(rows, list) else [rows])


async def read_pages(
    api: ApiClient, path: str, size: int, after_each: Callable[[], Awaitable[None]] | None = None
) -> list[Any]:
    """Read the ids of all items as a client does, page by page."""
    ids: list[Any] = []
    address: str | None = path.format_map(PARENT)
    query: dict[str, Any] = {"page_size" if path.startswith("/api/v1/config/") else "limit": size}
    while address is not None and len(ids) < 10 * COUNT:
        response = await api.request("admin", "GET", address, params=query or None)
        assert response.status_code == 200, response.text
        body = response.json()
        (items,) = [value for name, value in body.items() if name in {"items", "data", "audits", "recommendations"}]
        assert len(items) <= size
        assert items or not ids or "next_after" in body, "an empty page after the last one"
        ids += [next(item[name] for name in IDENTITY if item.get(name)) for item in items]
        address, query = _next_page(address, query, body)
        if after_each and len(ids) < 4 * COUNT:
            await after_each()
    return ids


def _next_page(address: str, query: dict[str, Any], body: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    if "links" in body:
        return body["links"]["next"], {}
    if pagination := body.get("pagination"):
        is_last = pagination["page"] >= pagination["total_pages"]
        return None if is_last else address, {**query, "page": pagination["page"] + 1}
    if "has_more" in body:
        return address if body["has_more"] else None, {**query, "after": body["last_id"]}
    return address if body["items"] else None, {**query, "after": body["next_after"]}
