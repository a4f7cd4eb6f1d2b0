"""The routes of retraining, on real repositories: responses, refusals and queued jobs. No worker runs."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from cluster.db import Database, now
from cluster.ownership import LOCAL
from cluster.settings import get_settings
from jobs import queue
from jobs.states import State
from jobs.tables import Job
from pipelines.guardian.repositories import Repository
from tests.support.api_client import ApiClient
from tests.support.git_repos import commit_files, new_repository

PATH = "/v1/retrain"
STEPS = ["extract_data", "validate_data", "fine_tune", "export", "validate", "compare", "deploy"]


@pytest.fixture
def folder(api: ApiClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one file, inside the permitted root."""
    monkeypatch.setenv("FORGEARR_GUARDIAN__ROOTS", f"[{tmp_path}/code]")
    get_settings.cache_clear()
    folder = new_repository(tmp_path / "code" / "Hand Book")
    commit_files(folder, "Begin", {"a.py": "A = 1\n"})
    return folder


async def test_a_folder_is_registered_and_its_plan_returned(api: ApiClient, folder: Path, database: Database) -> None:
    response = await api.request("admin", "POST", PATH, json={"project_path": "Hand Book"})
    assert response.status_code == 200, response.text
    body = response.json()
    assert body.keys() == {"triggered", "reason", "plan", "job_id"}
    assert (body["triggered"], body["reason"]) == (True, "never trained")
    assert [(step["id"], step["name"]) for step in body["plan"]["plan"]] == [
        (str(number), name) for number, name in enumerate(STEPS, 1)
    ]
    assert body["plan"]["estimated_duration_minutes"] == 47
    assert {step["estimate"] for step in body["plan"]["plan"]} == {"default"}
    async with database.read_transaction() as session:
        (repository,) = await session.scalars(select(Repository))
    assert (repository.name, repository.model, repository.path) == ("hand-book", "hand-book", str(folder))
    job = await api.get_job(body["job_id"])
    assert (job["kind"], job["created_by"]) == ("retrain", "admin")
    assert job["spec"]["repository_id"] == repository.id
    assert len(job["spec"]["commit"]) == 40

    # A repeated request returns the same plan, however it names the repository.
    for request in (
        {"project_path": str(folder)},
        {"repository": "hand-book"},
        {"repository": repository.id, "force": True},
    ):
        again = (await api.request("admin", "POST", PATH, json=request)).json()
        assert (again["triggered"], again["job_id"]) == (True, body["job_id"])
        assert again["reason"] == f"{body['job_id']} is not finished yet"
    assert (await api.count_kinds())["retrain"] == 1


@pytest.mark.both_databases
async def test_the_policy_applies_unless_force_is_set(api: ApiClient, folder: Path, database: Database) -> None:
    first = (await api.request("admin", "POST", PATH, json={"project_path": str(folder), "auto_deploy": False})).json()
    assert [step["name"] for step in first["plan"]["plan"]] == STEPS[:-1]
    job = await api.get_job(first["job_id"])
    assert job["spec"]["auto_deploy"] is False
    await api.update_job(first["job_id"], state=State.SUCCEEDED)
    async with database.transaction() as session:
        trained = {"trained_commit": job["spec"]["commit"], "trained_at": now(), "trained_job_id": job["id"]}
        await session.execute(update(Repository).values(**trained))
    skipped = (await api.request("admin", "POST", PATH, json={"repository": "hand-book"})).json()
    assert (skipped["triggered"], skipped["job_id"]) == (False, None)
    assert skipped["reason"] == "nothing has changed since the last training"
    forced = (await api.request("admin", "POST", PATH, json={"repository": "hand-book", "force": True})).json()
    assert (forced["triggered"], forced["reason"]) == (True, "it is forced")
    assert (await api.get_job(forced["job_id"]))["spec"]["force"] is True


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"project_path": "../elsewhere"}, 400, "must not contain"),
        ({"project_path": "/etc"}, 403, "outside"),
        ({"project_path": "nothing"}, 400, "nothing"),
        ({"project_path": "."}, 400, "not a git repository"),
        ({"repository": "unknown"}, 404, "There is no repository 'unknown'"),
        ({"repository": "x", "project_path": "y"}, 422, "not both"),
        ({"project_path": ""}, 422, "project_path"),
        ({"force": "yes"}, 422, "force"),
        ({"colour": "red"}, 422, "colour"),
    ],
)
async def test_invalid_requests_change_nothing(
    api: ApiClient, folder: Path, database: Database, body: dict[str, Any], status: int, message: str
) -> None:
    response = await api.request("admin", "POST", PATH, json=body)
    assert response.status_code == status, response.text
    assert message in response.json()["error"]["message"]
    async with database.read_transaction() as session:
        assert await session.scalar(select(Repository.id)) is None
    assert (await api.count_kinds())["retrain"] == 0


async def test_retraining_is_for_administrators(api: ApiClient, folder: Path) -> None:
    plan = (await api.request("admin", "POST", PATH, json={"project_path": str(folder)})).json()["job_id"]
    for method, path in (
        ("POST", PATH),
        ("GET", f"{PATH}/{plan}"),
        ("POST", f"{PATH}/{plan}/pause"),
        ("POST", f"{PATH}/{plan}/resume"),
    ):
        refused = await api.request("ada", method, path, **({"json": {}} if method == "POST" else {}))
        assert refused.status_code == 403


@pytest.mark.both_databases
async def test_a_plan_is_read_paused_and_resumed(api: ApiClient, folder: Path, database: Database) -> None:
    plan = (await api.request("admin", "POST", PATH, json={"project_path": str(folder)})).json()["job_id"]
    body = (await api.request("admin", "GET", f"{PATH}/{plan}")).json()
    assert (body["status"], body["model"], body["promoted"]) == ("queued", None, None)
    assert [step["state"] for step in body["plan"]] == [None] * 7

    # The state of the plan while its second step runs.
    spec = {"train": "a", "held_out": "b"}
    verdict = {"promoted": False, "reason": "It is worse.", "improvement": -0.1}
    checkpoint = {"model": "hand-book", "commit": "0" * 40, "feedback": True, "auto_deploy": False, "training": {}}
    async with database.transaction() as session:
        job = await queue.get(session, plan, LOCAL, lock=True)
        job.checkpoint = checkpoint
        running = await queue.enqueue_child(session, job, "validate_data", "validate_data", spec)
        running.state, running.progress = State.RUNNING, 40
        compared = await queue.enqueue_child(
            session, job, "compare", "compare", {"name": "m", "version": 1, "job_id": "job_1"}
        )
        compared.state, compared.result = State.SUCCEEDED, verdict
    body = (await api.request("admin", "GET", f"{PATH}/{plan}")).json()
    assert (body["model"], body["commit"]) == ("hand-book", "0" * 40)
    assert (body["promoted"], body["reason"], body["comparison"]) == (False, "It is worse.", verdict)
    assert [step["name"] for step in body["plan"]] == ["extract_data", "gather_feedback", *STEPS[1:-1]]
    step = next(step for step in body["plan"] if step["name"] == "validate_data")
    assert (step["state"], step["progress"], step["job_id"]) == ("running", 40, running.id)

    paused = await api.request("admin", "POST", f"{PATH}/{plan}/pause")
    assert (paused.status_code, paused.json()["status"]) == (200, "paused")
    async with database.read_transaction() as session:
        assert (await session.get_one(Job, running.id)).control == "pause"
    resumed = (await api.request("admin", "POST", f"{PATH}/{plan}/resume")).json()
    assert resumed["status"] == "queued"
    async with database.read_transaction() as session:
        assert (await session.get_one(Job, running.id)).control is None
    refused = await api.request("admin", "POST", f"{PATH}/{plan}/resume")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "job_state_conflict")


async def test_other_jobs_are_not_plans(api: ApiClient) -> None:
    other = await api.queue_training("admin")
    for method, path in (("GET", f"{PATH}/{other}"), ("POST", f"{PATH}/{other}/pause"), ("GET", f"{PATH}/job_none")):
        assert (await api.request("admin", method, path)).status_code == 404
