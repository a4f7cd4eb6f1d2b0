"""The routes of retraining, without a worker: what they answer, refuse and queue, for real repositories."""

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

pytestmark = pytest.mark.both_databases

PATH = "/v1/retrain"
STEPS = ["extract_data", "validate_data", "fine_tune", "export", "validate", "compare", "deploy"]


@pytest.fixture
def folder(api: ApiClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one file, in the folder that repositories may lie in."""
    monkeypatch.setenv("FORGEARR_GUARDIAN__ROOTS", f"[{tmp_path}/code]")
    get_settings.cache_clear()
    folder = new_repository(tmp_path / "code" / "Hand Book")
    commit_files(folder, "Begin", {"a.py": "A = 1\n"})
    return folder


async def test_a_folder_is_registered_and_its_plan_told(api: ApiClient, folder: Path, database: Database) -> None:
    answer = await api.request("admin", "POST", PATH, json={"project_path": "Hand Book"})
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert told.keys() == {"triggered", "reason", "plan", "job_id"}
    assert (told["triggered"], told["reason"]) == (True, "never trained")
    assert [(step["id"], step["name"]) for step in told["plan"]["plan"]] == [
        (str(number), name) for number, name in enumerate(STEPS, 1)
    ]
    assert told["plan"]["estimated_duration_minutes"] == 47
    assert {step["estimate"] for step in told["plan"]["plan"]} == {"default"}
    async with database.read_transaction() as session:
        (repository,) = await session.scalars(select(Repository))
    assert (repository.name, repository.model, repository.path) == ("hand-book", "hand-book", str(folder))
    job = await api.get_job(told["job_id"])
    assert (job["kind"], job["created_by"]) == ("retrain", "admin")
    assert job["spec"]["repository_id"] == repository.id
    assert len(job["spec"]["commit"]) == 40

    # Asked again, by whatever name, it is the same plan.
    for body in (
        {"project_path": str(folder)},
        {"repository": "hand-book"},
        {"repository": repository.id, "force": True},
    ):
        again = (await api.request("admin", "POST", PATH, json=body)).json()
        assert (again["triggered"], again["job_id"]) == (True, told["job_id"])
        assert again["reason"] == f"{told['job_id']} is not finished yet"
    assert (await api.count_kinds())["retrain"] == 1


async def test_the_policy_decides_unless_it_is_forced(api: ApiClient, folder: Path, database: Database) -> None:
    first = (await api.request("admin", "POST", PATH, json={"project_path": str(folder), "auto_deploy": False})).json()
    assert [step["name"] for step in first["plan"]["plan"]] == STEPS[:-1]
    job = await api.get_job(first["job_id"])
    assert job["spec"]["auto_deploy"] is False
    await api.update_job(first["job_id"], state=State.SUCCEEDED)
    async with database.transaction() as session:
        learned = {"trained_commit": job["spec"]["commit"], "trained_at": now(), "trained_job_id": job["id"]}
        await session.execute(update(Repository).values(**learned))
    told = (await api.request("admin", "POST", PATH, json={"repository": "hand-book"})).json()
    assert (told["triggered"], told["job_id"]) == (False, None)
    assert told["reason"] == "nothing has changed since the last training"
    forced = (await api.request("admin", "POST", PATH, json={"repository": "hand-book", "force": True})).json()
    assert (forced["triggered"], forced["reason"]) == (True, "it is forced")
    assert (await api.get_job(forced["job_id"]))["spec"]["force"] is True


@pytest.mark.parametrize(
    ("body", "status", "said"),
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
async def test_bad_wishes_change_nothing(
    api: ApiClient, folder: Path, database: Database, body: dict[str, Any], status: int, said: str
) -> None:
    answer = await api.request("admin", "POST", PATH, json=body)
    assert answer.status_code == status, answer.text
    assert said in answer.json()["error"]["message"]
    async with database.read_transaction() as session:
        assert await session.scalar(select(Repository.id)) is None
    assert (await api.count_kinds())["retrain"] == 0


async def test_it_is_for_administrators(api: ApiClient, folder: Path) -> None:
    plan = (await api.request("admin", "POST", PATH, json={"project_path": str(folder)})).json()["job_id"]
    for method, path in (
        ("POST", PATH),
        ("GET", f"{PATH}/{plan}"),
        ("POST", f"{PATH}/{plan}/pause"),
        ("POST", f"{PATH}/{plan}/resume"),
    ):
        refused = await api.request("ada", method, path, **({"json": {}} if method == "POST" else {}))
        assert refused.status_code == 403


async def test_a_plan_is_followed_held_and_resumed(api: ApiClient, folder: Path, database: Database) -> None:
    plan = (await api.request("admin", "POST", PATH, json={"project_path": str(folder)})).json()["job_id"]
    shown = (await api.request("admin", "GET", f"{PATH}/{plan}")).json()
    assert (shown["status"], shown["model"], shown["promoted"]) == ("queued", None, None)
    assert [step["state"] for step in shown["plan"]] == [None] * 7

    # As it is when its second step runs, and waits for it.
    learned = {"train": "a", "held_out": "b"}
    verdict = {"promoted": False, "reason": "It is worse.", "improvement": -0.1}
    outset = {"model": "hand-book", "commit": "0" * 40, "feedback": True, "auto_deploy": False, "training": {}}
    async with database.transaction() as session:
        job = await queue.get(session, plan, LOCAL, lock=True)
        job.checkpoint = outset
        running = await queue.enqueue_child(session, job, "validate_data", "validate_data", learned)
        running.state, running.progress = State.RUNNING, 40
        compared = await queue.enqueue_child(
            session, job, "compare", "compare", {"name": "m", "version": 1, "job_id": "job_1"}
        )
        compared.state, compared.result = State.SUCCEEDED, verdict
    shown = (await api.request("admin", "GET", f"{PATH}/{plan}")).json()
    assert (shown["model"], shown["commit"]) == ("hand-book", "0" * 40)
    assert (shown["promoted"], shown["reason"], shown["comparison"]) == (False, "It is worse.", verdict)
    assert [step["name"] for step in shown["plan"]] == ["extract_data", "gather_feedback", *STEPS[1:-1]]
    step = next(step for step in shown["plan"] if step["name"] == "validate_data")
    assert (step["state"], step["progress"], step["job_id"]) == ("running", 40, running.id)

    held = await api.request("admin", "POST", f"{PATH}/{plan}/pause")
    assert (held.status_code, held.json()["status"]) == (200, "paused")
    async with database.read_transaction() as session:
        assert (await session.get_one(Job, running.id)).control == "pause"
    went_on = (await api.request("admin", "POST", f"{PATH}/{plan}/resume")).json()
    assert went_on["status"] == "queued"
    async with database.read_transaction() as session:
        assert (await session.get_one(Job, running.id)).control is None
    refused = await api.request("admin", "POST", f"{PATH}/{plan}/resume")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "job_state_conflict")


async def test_another_job_is_no_plan(api: ApiClient) -> None:
    other = await api.queue_training("admin")
    for method, path in (("GET", f"{PATH}/{other}"), ("POST", f"{PATH}/{other}/pause"), ("GET", f"{PATH}/job_none")):
        assert (await api.request("admin", method, path)).status_code == 404
