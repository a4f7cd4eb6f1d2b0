"""API3, broken authorization of properties: what a user wants to decide by a field that is for administrators."""

from typing import Any

import pytest
from sqlalchemy import func, select, update

from cluster import identity
from cluster.db import now
from jobs import queue, schedules
from jobs.registry import Resources
from jobs.states import State
from jobs.tables import Job, Schedule
from tests.support.api_client import LEARN, SESSION, SESSIONS, ApiClient

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)

JOBS, SCHEDULES = "/api/v1/jobs", "/api/v1/schedules"
FORGE = {**LEARN, "deploy": False}
VALIDATE = {"job_id": "job_1"}
CRON = {"name": "nightly", "cron": "0 3 * * *"}

RESERVED = [
    pytest.param(JOBS, {"kind": "probe"}, "resources", {"cpus": 0.0001}, id="start-a-process-for-each-job"),
    pytest.param(JOBS, {"kind": "fine_tune", "spec": LEARN}, "resources", {}, id="train-in-a-shared-worker"),
    pytest.param(JOBS, {"kind": "probe"}, "priority", 1, id="be-first"),
    pytest.param(JOBS, {"kind": "probe"}, "max_attempts", 4, id="crash-again-and-again"),
    pytest.param(JOBS, {"kind": "probe"}, "spec.seconds", 61, id="occupy-a-slot-for-long"),
    pytest.param(JOBS, {"kind": "probe"}, "spec.memory_mb", 1, id="take-memory"),
    pytest.param(JOBS, {"kind": "forge", "spec": FORGE}, "spec.gates", {"max_kl": None}, id="pass-whatever-it-made"),
    pytest.param(
        JOBS, {"kind": "forge", "spec": FORGE}, "spec.gates", {"max_kl": 0.0}, id="choose-even-stricter-gates"
    ),
    pytest.param(JOBS, {"kind": "validate", "spec": VALIDATE}, "spec.gates", {"max_kl": None}, id="pass-afterwards"),
    pytest.param(JOBS, {"kind": "forge", "spec": FORGE}, "spec.deploy", True, id="be-what-all-are-served"),
    pytest.param(JOBS, {"kind": "fine_tune", "spec": LEARN}, "spec.base_model", "/etc", id="read-a-folder"),
    pytest.param(SCHEDULES, {**CRON, "kind": "probe"}, "priority", 1, id="be-first-every-night"),
    pytest.param(SCHEDULES, {**CRON, "kind": "probe"}, "spec.seconds", 61, id="occupy-a-slot-every-night"),
    pytest.param(
        SCHEDULES, {**CRON, "kind": "forge", "spec": FORGE}, "spec.gates", {"max_kl": None}, id="pass-nightly"
    ),
]
FIELDS = {
    "resources": {"cpus": 1},
    "priority": 1,
    "max_attempts": 4,
    "gates": {"max_kl": None},
}
OTHER_DOORS = [
    pytest.param("/v1/fine-tune", {"project_name": "house", **LEARN}, id="fine-tune"),
    pytest.param(
        "/v1/fine_tuning/jobs", {"model": "forgearr/tiny", "training_file": "file-1"}, id="openai-fine-tuning"
    ),
    pytest.param(SESSIONS, SESSION, id="session"),
    pytest.param(
        "/v1/batches",
        {"input_file_id": "file-1", "endpoint": "/v1/embeddings", "completion_window": "24h"},
        id="batch",
    ),
]


@pytest.mark.parametrize(("path", "body", "field", "value"), RESERVED)
async def test_a_user_who_wants_to(api: ApiClient, path: str, body: dict[str, Any], field: str, value: object) -> None:
    wanted = with_field(body, field, value)
    refused = await api.request("ada", "POST", path, json=wanted)
    assert (refused.status_code, refused.json()["error"]) == (403, "forbidden")
    assert field.removeprefix("spec.") in refused.json()["message"]
    assert await count_rows(api) == 0
    allowed = await api.request("admin", "POST", path, json=wanted)
    assert allowed.status_code == 201, allowed.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param(JOBS, {"kind": "probe", "priority": -1, "max_attempts": 3, "spec": {"seconds": 60}}, id="job"),
        pytest.param(JOBS, {"kind": "forge", "spec": {**FORGE, "gates": {}}}, id="forge"),
        pytest.param(SCHEDULES, {**CRON, "kind": "probe", "priority": 0}, id="schedule"),
    ],
)
async def test_a_user_may_still(api: ApiClient, path: str, body: dict[str, Any]) -> None:
    response = await api.request("ada", "POST", path, json=body)
    assert response.status_code == 201, response.text


async def test_a_user_cannot_change_a_schedule_so_either(api: ApiClient) -> None:
    schedule = (await api.request("ada", "POST", SCHEDULES, json={**CRON, "kind": "probe"})).json()
    for change in ({"priority": 1}, {"spec": {"seconds": 61}}):
        body = {**CRON, "kind": "probe", **change}
        assert (await api.request("ada", "PUT", f"{SCHEDULES}/{schedule['id']}", json=body)).status_code == 403
    unchanged = (await api.request("ada", "GET", f"{SCHEDULES}/{schedule['id']}")).json()
    assert unchanged == schedule


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(("path", "body"), OTHER_DOORS)
async def test_no_other_door_takes(api: ApiClient, path: str, body: dict[str, Any], field: str) -> None:
    bodies = [{**body, field: FIELDS[field]}]
    if path == SESSIONS:
        bodies.append({**body, "config": {field: FIELDS[field]}})
    for username in ("ada", "admin"):
        for wanted in bodies:
            response = await api.request(username, "POST", path, json=wanted)
            assert response.status_code in {400, 422}, response.text
            assert field in response.text
    assert await count_rows(api) == 0


async def test_the_steps_of_a_users_job_get_what_their_kind_asks_for(api: ApiClient) -> None:
    parent_id = await api.queue_job("forge", FORGE, "ada")
    async with api.database.transaction() as session:
        parent = await session.get_one(Job, parent_id)
        child = await queue.enqueue_child(session, parent, "export", "export", VALIDATE, Resources(cpus=2))
    assert (child.owner_id, child.demand) == (api.users["ada"].id, "2 CPU")
    job_id = await api.queue_training("ada")
    response = await api.request("ada", "POST", f"/validate/{job_id}?wait=0")
    assert response.status_code == 202
    async with api.database.read_transaction() as session:
        step = await session.get_one(Job, response.json()["validation_job_id"])
    assert step.demand == "1 CPU"


async def test_a_former_administrators_schedule_has_a_users_rights(api: ApiClient) -> None:
    body = {**CRON, "kind": "probe", "priority": 9}
    schedule_id = (await api.request("admin", "POST", SCHEDULES, json=body)).json()["id"]
    async with api.database.transaction() as session:
        user = await session.get_one(identity.User, api.users["admin"].id)
        user.role = "user"
        await session.execute(update(Schedule).values(next_fire_at=now()))
    async with api.database.transaction() as session:
        await schedules.fire_due(session)
    async with api.database.read_transaction() as session:
        schedule = await session.get_one(Schedule, schedule_id)
        (job,) = await session.scalars(select(Job))
    assert (schedule.enabled, job.state, job.error) == (
        False,
        State.FAILED,
        {"code": "forbidden", "message": "Only an administrator may set priority above 0."},
    )


def with_field(body: dict[str, Any], field: str, value: object) -> dict[str, Any]:
    name, _, inner = field.partition(".")
    return {**body, name: {**body.get(name, {}), inner: value} if inner else value}


async def count_rows(api: ApiClient) -> int:
    async with api.database.read_transaction() as session:
        counts = [await session.scalar(select(func.count()).select_from(table)) for table in (Job, Schedule)]
    return sum(count or 0 for count in counts)
