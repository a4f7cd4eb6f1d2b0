"""The routes of repositories, and the retrainings that their checks queue."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel
from sqlalchemy import func, select, update

from cluster.db import Database, now
from cluster.settings import get_settings
from jobs import registry
from jobs.context import Context
from jobs.leases import Claim
from jobs.registry import Kind, kinds
from jobs.states import State
from jobs.tables import Job, Schedule
from pipelines.guardian import watch_repo, watch_repositories
from pipelines.guardian.git.errors import NotARepository
from pipelines.guardian.repositories import RETRAIN_KIND, WATCH_ALL_KIND, Repository
from pipelines.guardian.watch_repo import WATCH_REPO_KIND, WatchSpec
from pipelines.guardian.watch_repositories import WatchAllSpec
from serve.app import create_app
from tests.support.git_repos import commit_files, git, new_repository
from tests.support.recording_link import RecordingLink

PATH = "/api/v1/repos"
SECRET = "a secret of webhooks"


class PlanSpec(BaseModel):
    repository_id: str
    commit: str
    auto_deploy: bool


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> Path:
    """The root that may contain repositories."""
    folder = tmp_path / "root"
    folder.mkdir()
    monkeypatch.setenv("FORGEARR_GUARDIAN__ROOTS", f"['{folder}']")
    get_settings.cache_clear()
    return folder


@pytest.fixture
def folder(root: Path) -> Path:
    """A repository with a commit."""
    folder = new_repository(root / "work")
    commit_files(folder, "First", {"a.py": "1\n"})
    return folder


@pytest.fixture
async def client(root: Path, database: Database) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(), client=("127.0.0.1", 40000))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", timeout=60) as client:
        yield client


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Register the kind of plans, so that they can be queued."""
    if RETRAIN_KIND not in kinds():
        known = registry._kinds  # pyright: ignore[reportPrivateUsage]
        monkeypatch.setitem(known, RETRAIN_KIND, Kind(RETRAIN_KIND, "", PlanSpec, ""))


def new_context(kind: str) -> Context:
    return Context(Claim("job_w", "t", kind, {}, None, 1, 3, None, None, {}, "w", None), RecordingLink())


async def check(repository: dict[str, Any]) -> dict[str, Any]:
    spec = WatchSpec(repository_id=repository["id"])
    return await asyncio.to_thread(watch_repo.watch_repo, new_context(WATCH_REPO_KIND), spec)


async def jobs_of(database: Database, kind: str) -> list[Job]:
    async with database.read_transaction() as session:
        return list(await session.scalars(select(Job).where(Job.kind == kind).order_by(Job.created_at)))


async def end_all(database: Database, state: State = State.SUCCEEDED) -> None:
    async with database.transaction() as session:
        await session.execute(update(Job).values(state=state, finished_at=now()))


async def register(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post(PATH, json={"name": "work", **fields})
    assert response.status_code == 201, response.text
    return response.json()


async def test_a_repository_is_registered_changed_and_deleted(
    client: httpx.AsyncClient, folder: Path, database: Database
) -> None:
    created = await register(
        client,
        path=str(folder),
        policy={"min_files": 5, "critical_paths": ["src/**"]},
        training={"epochs": 2},
        webhook_secret=SECRET,
    )
    assert created["id"].startswith("repo_")
    assert (created["path"], created["model"], created["has_webhook_secret"]) == (str(folder), "work", True)
    assert (created["policy"]["min_files"], created["training"]) == (5, {"epochs": 2})
    assert len(await jobs_of(database, WATCH_REPO_KIND)) == 1, "the first check is queued"
    async with database.read_transaction() as session:
        assert await session.scalar(select(func.count()).where(Schedule.kind == WATCH_ALL_KIND)) == 1

    response = await client.patch(f"{PATH}/work", json={"policy": {"min_files": None}, "enabled": False})
    assert response.status_code == 200, response.text
    assert (response.json()["policy"]["min_files"], response.json()["enabled"]) == (None, False)
    assert (response.json()["has_webhook_secret"], response.json()["training"]) == (True, {"epochs": 2})
    assert not (await client.patch(f"{PATH}/work", json={"webhook_secret": None})).json()["has_webhook_secret"]

    listed = (await client.get(PATH, params={"path": str(folder)})).json()
    assert [repository["id"] for repository in listed["items"]] == [created["id"]]
    assert (await client.get(f"{PATH}/{created['id']}")).json() == (await client.get(f"{PATH}/work")).json()
    assert (await client.post(PATH, json={"name": "work", "path": str(folder)})).status_code == 409
    assert (await client.delete(f"{PATH}/work")).status_code == 204
    deleted = await client.get(f"{PATH}/work")
    assert (deleted.status_code, deleted.json()["error_code"]) == (404, "REPOSITORY_NOT_FOUND")


async def test_secrets_are_sealed_and_never_returned(client: httpx.AsyncClient, database: Database) -> None:
    url = "https://git.example.com/ada/work.git"
    credentials = {"username": "ada", "token": "t0p-s3cret"}
    created = await client.post(
        PATH, json={"name": "work", "url": url, "credentials": credentials, "webhook_secret": SECRET}
    )
    assert created.status_code == 201
    assert created.json()["has_credentials"]
    texts = [created.text, (await client.get(PATH)).text, (await client.patch(f"{PATH}/work", json={})).text]
    async with database.read_transaction() as session:
        row = await session.scalar(select(Repository))
        assert row is not None
        texts += [str(row.credentials), str(row.webhook_secret)]
    assert not any("t0p-s3cret" in text or SECRET in text for text in texts)

    moved = (await client.patch(f"{PATH}/work", json={"url": "https://elsewhere.example.com/ada/work"})).json()
    assert not moved["has_credentials"], "they belong to the former host"


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({}, 422, "VALIDATION_ERROR"),
        ({"path": "work", "url": "https://example.com/x"}, 422, "VALIDATION_ERROR"),
        ({"path": "plain"}, 400, "NOT_A_REPOSITORY"),
        ({"path": "missing"}, 400, "NOT_A_REPOSITORY"),
        ({"path": "empty"}, 400, "EMPTY_REPOSITORY"),
        ({"path": "../outside"}, 400, "INVALID_REPOSITORY_PATH"),
        ({"path": "work/../../outside"}, 400, "INVALID_REPOSITORY_PATH"),
        ({"path": "/etc"}, 403, "FOLDER_OUTSIDE"),
        ({"path": "/no/such/folder"}, 403, "FOLDER_OUTSIDE"),
        ({"path": "~nobody-by-this-name/x"}, 400, "INVALID_REPOSITORY_PATH"),
        ({"path": "leads-out"}, 403, "FOLDER_OUTSIDE"),
        ({"path": "leads-out-inside"}, 403, "FOLDER_OUTSIDE"),
        ({"path": "loop"}, 400, "INVALID_REPOSITORY_PATH"),
        ({"path": "work", "branch": "nope"}, 400, "BRANCH_NOT_FOUND"),
        ({"path": "work", "branch": "-x"}, 422, "VALIDATION_ERROR"),
        ({"path": "work", "branch": "a..b"}, 422, "VALIDATION_ERROR"),
        ({"url": "file:///etc"}, 400, "INVALID_REPOSITORY_URL"),
        ({"url": "https://ada:secret@example.com/x"}, 400, "INVALID_REPOSITORY_URL"),
        ({"url": "ssh://git@example.com/x", "credentials": {"token": "x"}}, 422, "VALIDATION_ERROR"),
        ({"path": "work", "training": {"epochs": -1}}, 422, "INVALID_JOB_SPEC"),
        ({"path": "work", "training": {"data": {"dataset": "x"}}}, 422, "VALIDATION_ERROR"),
        ({"path": "work", "policy": {"quiet_hours": "late"}}, 422, "VALIDATION_ERROR"),
        ({"path": "work", "webhook_secret": "short"}, 422, "VALIDATION_ERROR"),
    ],
)
async def test_invalid_repositories_are_refused(
    client: httpx.AsyncClient, folder: Path, root: Path, database: Database, fields: Any, status: int, code: str
) -> None:
    outside = new_repository(root.parent / "outside")
    commit_files(outside, "First", {"a": "1"})
    (root / "plain").mkdir()
    new_repository(root / "empty")
    (root / "leads-out").symlink_to(outside)
    (root / "loop").symlink_to(root / "loop")
    (root / "leads-out-inside").mkdir()
    (root / "leads-out-inside" / ".git").write_text(f"gitdir: {outside}/.git\n")

    response = await client.post(PATH, json={"name": "other", **fields})
    assert (response.status_code, response.json()["error_code"]) == (status, code), response.text
    assert "ada:secret" not in response.text
    async with database.read_transaction() as session:
        assert await session.scalar(select(func.count()).select_from(Repository)) == 0
        assert await session.scalar(select(func.count()).select_from(Job)) == 0


def test_an_unreadable_folder_is_an_error(folder: Path) -> None:
    if os.getuid() == 0:
        pytest.skip("Root may read everything.")
    folder.chmod(0)
    try:
        with pytest.raises(Exception, match="may not read"):
            watch_repo.evaluate_folder(folder)
    finally:
        folder.chmod(0o755)


@pytest.mark.usefixtures("plans")
async def test_a_check_queues_a_plan_once(client: httpx.AsyncClient, folder: Path, database: Database) -> None:
    created = await register(client, path=str(folder), policy={"min_files": 2, "min_hours": None})
    tip = git(folder, "rev-parse", "HEAD")
    result = await check(created)
    (plan,) = await jobs_of(database, RETRAIN_KIND)
    assert (result["commit"], result["reason"], result["retrain_job_id"]) == (tip, "never trained", plan.id)
    assert (plan.spec["repository_id"], plan.spec["commit"]) == (created["id"], tip)
    assert (await check(created))["retrain_job_id"] == plan.id, "the plan is reused"

    body = (await client.get(f"{PATH}/work")).json()
    assert (body["seen_commit"], body["check_error"]) == (tip, None)
    refused = await client.delete(f"{PATH}/work")
    assert (refused.status_code, refused.json()["error_code"]) == (409, "REPOSITORY_IN_USE")

    await end_all(database)
    async with database.transaction() as session:
        await session.execute(update(Repository).values(tried_commit=tip, tried_job_id=plan.id))
    assert (await check(created))["retrain_job_id"] is None, "this commit was tried already"
    async with database.transaction() as session:
        await session.execute(update(Repository).values(trained_commit=tip, trained_at=now()))
    assert (await check(created))["reason"] == "nothing has changed since the last training"
    commit_files(folder, "Second", {"b.py": "1\n"})
    assert (await check(created))["retrain_job_id"] is None
    newest = commit_files(folder, "Third", {"c.py": "1\n"})
    result = await check(created)
    assert result["reason"] == "2 files changed (threshold: 2)"
    assert (await jobs_of(database, RETRAIN_KIND))[-1].spec["commit"] == newest


@pytest.mark.usefixtures("plans")
async def test_a_failed_check_is_recorded(client: httpx.AsyncClient, folder: Path, database: Database) -> None:
    created = await register(client, path=str(folder))
    await asyncio.to_thread(folder.rename, folder.with_name("moved"))
    with pytest.raises(NotARepository):
        await check(created)
    assert "There is no folder" in (await client.get(f"{PATH}/work")).json()["check_error"]
    await asyncio.to_thread(folder.with_name("moved").rename, folder)
    await check(created)
    assert (await client.get(f"{PATH}/work")).json()["check_error"] is None
    assert len(await jobs_of(database, RETRAIN_KIND)) == 1


async def test_a_queued_check_is_reused(client: httpx.AsyncClient, folder: Path, database: Database) -> None:
    await register(client, path=str(folder))
    first = (await client.post(f"{PATH}/work/check")).json()["job_id"]
    assert (await client.post(f"{PATH}/work/check")).json()["job_id"] == first
    result = await asyncio.to_thread(watch_repositories.watch_repositories, new_context(WATCH_ALL_KIND), WatchAllSpec())
    assert result == {"asked": [first]}
    async with database.transaction() as session:
        await session.execute(update(Job).values(state=State.RUNNING))
    second = (await client.post(f"{PATH}/work/check")).json()["job_id"]
    assert second != first, "a running check may have read an older commit"

    await client.patch(f"{PATH}/work", json={"enabled": False})
    result = await asyncio.to_thread(watch_repositories.watch_repositories, new_context(WATCH_ALL_KIND), WatchAllSpec())
    assert result == {"asked": []}


async def test_the_monitor_responds_as_documented(
    client: httpx.AsyncClient, folder: Path, root: Path, database: Database
) -> None:
    fresh = (await client.get("/v1/retrain/monitor", params={"project_path": "work"})).json()
    assert (fresh["should_retrain"], fresh["reason"]) == (True, "never trained")
    tip = git(folder, "rev-parse", "HEAD")
    await register(client, path=str(folder), policy={"min_files": 1, "min_hours": None, "critical_paths": ["core/"]})
    async with database.transaction() as session:
        await session.execute(update(Repository).values(trained_commit=tip, trained_at=now()))
    commit_files(folder, "Second", {"b.py": "1\n2\n"})
    body = (await client.get("/v1/retrain/monitor", params={"project_path": str(folder)})).json()
    assert (body["should_retrain"], body["reason"]) == (True, "1 file changed (threshold: 1)")
    assert body["metrics"]["commits_since_last_train"] == 1
    assert body["metrics"]["files_changed"] == 1
    assert body["metrics"]["critical_paths_changed"] is False
    assert body["checked_at"].endswith("Z")
    refused = await client.get("/v1/retrain/monitor", params={"project_path": "/etc"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "folder_outside")
    here = await client.get("/v1/retrain/monitor")
    assert (here.status_code, here.json()["error"]["code"]) == (400, "not_a_repository"), here.text
    assert "not a git repository" in here.json()["detail"]
