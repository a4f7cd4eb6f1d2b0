"""The routes of repositories, and the retrainings that watching a repository leads to."""

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
    """The folder in which repositories may lie."""
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
    """Plans can be queued, whoever carries them out."""
    if RETRAIN_KIND not in kinds():
        known = registry._kinds  # pyright: ignore[reportPrivateUsage]
        monkeypatch.setitem(known, RETRAIN_KIND, Kind(RETRAIN_KIND, "", PlanSpec, ""))


def a_context(kind: str) -> Context:
    return Context(Claim("job_w", "t", kind, {}, None, 1, 3, None, None, {}, "w", None), RecordingLink())


async def look(repository: dict[str, Any]) -> dict[str, Any]:
    spec = WatchSpec(repository_id=repository["id"])
    return await asyncio.to_thread(watch_repo.watch_repo, a_context(WATCH_REPO_KIND), spec)


async def jobs_of(database: Database, kind: str) -> list[Job]:
    async with database.read_transaction() as session:
        return list(await session.scalars(select(Job).where(Job.kind == kind).order_by(Job.created_at)))


async def end_all(database: Database, state: State = State.SUCCEEDED) -> None:
    async with database.transaction() as session:
        await session.execute(update(Job).values(state=state, finished_at=now()))


async def register(client: httpx.AsyncClient, **wanted: Any) -> dict[str, Any]:
    answer = await client.post(PATH, json={"name": "work", **wanted})
    assert answer.status_code == 201, answer.text
    return answer.json()


async def test_a_repository_is_registered_changed_and_deleted(
    client: httpx.AsyncClient, folder: Path, database: Database
) -> None:
    made = await register(
        client,
        path=str(folder),
        policy={"min_files": 5, "critical_paths": ["src/**"]},
        training={"epochs": 2},
        webhook_secret=SECRET,
    )
    assert made["id"].startswith("repo_")
    assert (made["path"], made["model"], made["has_webhook_secret"]) == (str(folder), "work", True)
    assert (made["policy"]["min_files"], made["training"]) == (5, {"epochs": 2})
    assert len(await jobs_of(database, WATCH_REPO_KIND)) == 1, "it is looked at for the first time"
    async with database.read_transaction() as session:
        assert await session.scalar(select(func.count()).where(Schedule.kind == WATCH_ALL_KIND)) == 1

    answer = await client.patch(f"{PATH}/work", json={"policy": {"min_files": None}, "enabled": False})
    assert answer.status_code == 200, answer.text
    assert (answer.json()["policy"]["min_files"], answer.json()["enabled"]) == (None, False)
    assert (answer.json()["has_webhook_secret"], answer.json()["training"]) == (True, {"epochs": 2})
    assert not (await client.patch(f"{PATH}/work", json={"webhook_secret": None})).json()["has_webhook_secret"]

    listed = (await client.get(PATH, params={"path": str(folder)})).json()
    assert [one["id"] for one in listed["items"]] == [made["id"]]
    assert (await client.get(f"{PATH}/{made['id']}")).json() == (await client.get(f"{PATH}/work")).json()
    assert (await client.post(PATH, json={"name": "work", "path": str(folder)})).status_code == 409
    assert (await client.delete(f"{PATH}/work")).status_code == 204
    gone = await client.get(f"{PATH}/work")
    assert (gone.status_code, gone.json()["error_code"]) == (404, "REPOSITORY_NOT_FOUND")


async def test_secrets_are_sealed_and_never_told(client: httpx.AsyncClient, database: Database) -> None:
    url = "https://git.example.com/ada/work.git"
    credentials = {"username": "ada", "token": "t0p-s3cret"}
    made = await client.post(
        PATH, json={"name": "work", "url": url, "credentials": credentials, "webhook_secret": SECRET}
    )
    assert made.status_code == 201
    assert made.json()["has_credentials"]
    answers = [made.text, (await client.get(PATH)).text, (await client.patch(f"{PATH}/work", json={})).text]
    async with database.read_transaction() as session:
        row = await session.scalar(select(Repository))
        assert row is not None
        answers += [str(row.credentials), str(row.webhook_secret)]
    assert not any("t0p-s3cret" in answer or SECRET in answer for answer in answers)

    moved = (await client.patch(f"{PATH}/work", json={"url": "https://elsewhere.example.com/ada/work"})).json()
    assert not moved["has_credentials"], "they were for the other machine"


@pytest.mark.parametrize(
    ("wanted", "status", "code"),
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
async def test_what_cannot_be_watched_is_refused(
    client: httpx.AsyncClient, folder: Path, root: Path, database: Database, wanted: Any, status: int, code: str
) -> None:
    outside = new_repository(root.parent / "outside")
    commit_files(outside, "First", {"a": "1"})
    (root / "plain").mkdir()
    new_repository(root / "empty")
    (root / "leads-out").symlink_to(outside)
    (root / "loop").symlink_to(root / "loop")
    (root / "leads-out-inside").mkdir()
    (root / "leads-out-inside" / ".git").write_text(f"gitdir: {outside}/.git\n")

    answer = await client.post(PATH, json={"name": "other", **wanted})
    assert (answer.status_code, answer.json()["error_code"]) == (status, code), answer.text
    assert "ada:secret" not in answer.text
    async with database.read_transaction() as session:
        assert await session.scalar(select(func.count()).select_from(Repository)) == 0
        assert await session.scalar(select(func.count()).select_from(Job)) == 0


def test_what_may_not_be_read_is_said_so(folder: Path) -> None:
    if os.getuid() == 0:
        pytest.skip("Root may read everything.")
    folder.chmod(0)
    try:
        with pytest.raises(Exception, match="may not read"):
            watch_repo.evaluate_folder(folder)
    finally:
        folder.chmod(0o755)


@pytest.mark.usefixtures("plans")
async def test_a_look_asks_for_a_plan_once(client: httpx.AsyncClient, folder: Path, database: Database) -> None:
    made = await register(client, path=str(folder), policy={"min_files": 2, "min_hours": None})
    tip = git(folder, "rev-parse", "HEAD")
    seen = await look(made)
    (plan,) = await jobs_of(database, RETRAIN_KIND)
    assert (seen["commit"], seen["reason"], seen["retrain_job_id"]) == (tip, "never trained", plan.id)
    assert (plan.spec["repository_id"], plan.spec["commit"]) == (made["id"], tip)
    assert (await look(made))["retrain_job_id"] == plan.id, "there is one already"

    shown = (await client.get(f"{PATH}/work")).json()
    assert (shown["seen_commit"], shown["check_error"]) == (tip, None)
    refused = await client.delete(f"{PATH}/work")
    assert (refused.status_code, refused.json()["error_code"]) == (409, "REPOSITORY_IN_USE")

    await end_all(database)
    async with database.transaction() as session:
        await session.execute(update(Repository).values(tried_commit=tip, tried_job_id=plan.id))
    assert (await look(made))["retrain_job_id"] is None, "this commit was tried, whatever came of it"
    async with database.transaction() as session:
        await session.execute(update(Repository).values(trained_commit=tip, trained_at=now()))
    assert (await look(made))["reason"] == "nothing has changed since the last training"
    commit_files(folder, "Second", {"b.py": "1\n"})
    assert (await look(made))["retrain_job_id"] is None
    newest = commit_files(folder, "Third", {"c.py": "1\n"})
    seen = await look(made)
    assert seen["reason"] == "2 files changed (threshold: 2)"
    assert (await jobs_of(database, RETRAIN_KIND))[-1].spec["commit"] == newest


@pytest.mark.usefixtures("plans")
async def test_what_a_look_cannot_see_is_noted_down(
    client: httpx.AsyncClient, folder: Path, database: Database
) -> None:
    made = await register(client, path=str(folder))
    await asyncio.to_thread(folder.rename, folder.with_name("moved"))
    with pytest.raises(NotARepository):
        await look(made)
    assert "There is no folder" in (await client.get(f"{PATH}/work")).json()["check_error"]
    await asyncio.to_thread(folder.with_name("moved").rename, folder)
    await look(made)
    assert (await client.get(f"{PATH}/work")).json()["check_error"] is None
    assert len(await jobs_of(database, RETRAIN_KIND)) == 1


async def test_a_repository_is_asked_for_once(client: httpx.AsyncClient, folder: Path, database: Database) -> None:
    await register(client, path=str(folder))
    first = (await client.post(f"{PATH}/work/check")).json()["job_id"]
    assert (await client.post(f"{PATH}/work/check")).json()["job_id"] == first
    asked = await asyncio.to_thread(watch_repositories.watch_repositories, a_context(WATCH_ALL_KIND), WatchAllSpec())
    assert asked == {"asked": [first]}
    async with database.transaction() as session:
        await session.execute(update(Job).values(state=State.RUNNING))
    second = (await client.post(f"{PATH}/work/check")).json()["job_id"]
    assert second != first, "one that runs may have looked too early"

    await client.patch(f"{PATH}/work", json={"enabled": False})
    asked = await asyncio.to_thread(watch_repositories.watch_repositories, a_context(WATCH_ALL_KIND), WatchAllSpec())
    assert asked == {"asked": []}


async def test_the_monitor_answers_as_documented(
    client: httpx.AsyncClient, folder: Path, root: Path, database: Database
) -> None:
    fresh = (await client.get("/v1/retrain/monitor", params={"project_path": "work"})).json()
    assert (fresh["should_retrain"], fresh["reason"]) == (True, "never trained")
    tip = git(folder, "rev-parse", "HEAD")
    await register(client, path=str(folder), policy={"min_files": 1, "min_hours": None, "critical_paths": ["core/"]})
    async with database.transaction() as session:
        await session.execute(update(Repository).values(trained_commit=tip, trained_at=now()))
    commit_files(folder, "Second", {"b.py": "1\n2\n"})
    told = (await client.get("/v1/retrain/monitor", params={"project_path": str(folder)})).json()
    assert (told["should_retrain"], told["reason"]) == (True, "1 file changed (threshold: 1)")
    assert told["metrics"]["commits_since_last_train"] == 1
    assert told["metrics"]["files_changed"] == 1
    assert told["metrics"]["critical_paths_changed"] is False
    assert told["checked_at"].endswith("Z")
    refused = await client.get("/v1/retrain/monitor", params={"project_path": "/etc"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "folder_outside")
    here = await client.get("/v1/retrain/monitor")
    assert (here.status_code, here.json()["error"]["code"]) == (400, "not_a_repository"), here.text
    assert "not a git repository" in here.json()["detail"]
