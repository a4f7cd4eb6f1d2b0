"""API4, unrestricted resource consumption: what one account wants to have more of than its share."""

import asyncio
from io import BytesIO
from typing import Any

import pytest
from sqlalchemy import update

from cluster import identity
from cluster.db import Database, now
from cluster.files import store as file_store
from cluster.identity.account_limits import AccountLimitReached
from cluster.ownership import Principal
from cluster.settings import get_settings
from jobs import queue, schedules
from jobs.queue import JobRequest
from jobs.schedules import ScheduleRequest
from jobs.states import State
from jobs.tables import Job, Schedule
from tests.support.api_client import ApiClient

JOBS, SCHEDULES, BATCHES = "/api/v1/jobs", "/api/v1/schedules", "/v1/batches"
PROBE = {"kind": "probe"}


@pytest.fixture(autouse=True)
def limits(home: object, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"JOBS": 3, "SCHEDULES": 2, "BATCHES": 1}
    limits |= {"FILES_MB": 1, "DATASETS_MB": 1, "RESPONSES_MB": 1, "MODELS_MB": 1, "GPU_HOURS": 2}
    for name, limit in limits.items():
        monkeypatch.setenv(f"FORGEARR_LIMITS__ACCOUNT_{name}", str(limit))
    get_settings.cache_clear()


async def queue_as(api: ApiClient, username: str, **fields: Any) -> int:
    return (await api.request(username, "POST", JOBS, json={**PROBE, **fields})).status_code


async def test_fill_the_queue(api: ApiClient) -> None:
    assert [await queue_as(api, "ada") for _ in range(4)] == [201, 201, 201, 403]
    refused = await api.request("ada", "POST", JOBS, json=PROBE)
    assert refused.json()["error_code"] == "ACCOUNT_LIMIT_REACHED"
    assert refused.json()["message"].startswith("Your account has 3 unfinished jobs, and may have 3. Wait until")
    assert refused.json()["details"] == {"resource": "jobs", "used": 3, "limit": 3}
    # Neither other users nor administrators are affected.
    assert await queue_as(api, "bob") == 201
    assert [await queue_as(api, "admin") for _ in range(5)] == [201] * 5
    jobs = (await api.request("ada", "GET", JOBS)).json()["items"]
    assert (await api.request("ada", "POST", f"{JOBS}/{jobs[0]['id']}/cancel")).status_code == 200
    assert await queue_as(api, "ada") == 201


async def test_come_back_with_jobs_that_had_ended(api: ApiClient) -> None:
    cancelled = [await api.queue_job("probe", {}, state=State.CANCELLED) for _ in range(6)]
    statuses = [(await api.request("ada", "POST", f"{JOBS}/{job}/retry")).status_code for job in cancelled]
    assert statuses == [200, 200, 200, 403, 403, 403]
    assert (await api.request("admin", "POST", f"{JOBS}/{cancelled[-1]}/retry")).status_code == 200


async def test_a_repeated_request_needs_no_room(api: ApiClient) -> None:
    options = {"json": PROBE, "headers": {"Idempotency-Key": "once"}}
    first = (await api.request("ada", "POST", JOBS, **options)).json()["id"]
    assert [await queue_as(api, "ada") for _ in range(2)] == [201, 201]
    assert (await api.request("ada", "POST", JOBS, **options)).json()["id"] == first


async def test_the_steps_of_a_job_do_not_count(api: ApiClient) -> None:
    parent_id = await api.queue_job("probe", {})
    async with api.database.transaction() as session:
        parent = await session.get_one(Job, parent_id)
        for number in range(9):
            await queue.enqueue_child(session, parent, f"step {number}", "probe", {})
    assert [await queue_as(api, "ada") for _ in range(3)] == [201, 201, 403]


async def test_have_many_schedules(api: ApiClient) -> None:
    bodies = [{**PROBE, "name": f"s{number}", "cron": "* * * * *", "enabled": False} for number in range(3)]
    created = [await api.request("ada", "POST", SCHEDULES, json=body) for body in bodies]
    assert [response.status_code for response in created] == [201, 201, 403]
    assert "2 schedules, and may have 2. Delete one" in created[-1].json()["message"]
    path = f"{SCHEDULES}/{created[0].json()['id']}"
    assert (await api.request("ada", "PUT", path, json=bodies[0])).status_code == 200
    assert (await api.request("ada", "DELETE", path)).status_code == 204
    assert (await api.request("ada", "POST", SCHEDULES, json=bodies[2])).status_code == 201


async def test_have_many_batches(api: ApiClient) -> None:
    async def create() -> tuple[int, dict[str, Any]]:
        body = {"input_file_id": file.id, "endpoint": "/v1/embeddings", "completion_window": "24h"}
        response = await api.request("ada", "POST", BATCHES, json=body)
        return response.status_code, response.json()

    principal = identity.principal(api.users["ada"])
    file = await file_store.create_file(
        api.database, BytesIO(b"{}"), filename="a.jsonl", purpose="batch", principal=principal
    )
    (first, batch), (second, refused) = await create(), await create()
    assert (first, second) == (200, 403)
    assert refused["error"]["code"] == "account_limit_reached"
    assert await queue_as(api, "ada") == 201
    async with api.database.transaction() as session:
        await session.execute(update(Job).where(Job.id == batch["job_id"]).values(state=State.SUCCEEDED))
    assert (await create())[0] == 200


async def test_a_schedule_outlives_a_full_account(api: ApiClient) -> None:
    ada = identity.principal(api.users["ada"])
    async with api.database.transaction() as session:
        schedule = await schedules.create(session, ScheduleRequest(name="s", kind="probe", cron="* * * * *"), ada)
    for _ in range(3):
        await queue_as(api, "ada")
    async with api.database.transaction() as session:
        await session.execute(update(Schedule).values(next_fire_at=now()))
        await schedules.fire_due(session)
    async with api.database.read_transaction() as session:
        schedule = await session.get_one(Schedule, schedule.id)
        job = await session.get_one(Job, schedule.last_job_id)
    assert job.state == State.FAILED
    assert job.error is not None
    assert job.error["code"] == "account_limit_reached"
    assert schedule.enabled
    assert schedule.next_fire_at is not None


@pytest.mark.both_databases
async def test_ask_for_many_at_the_same_moment(database: Database) -> None:
    ada = Principal(id="a" * 36, name="ada")

    async def ask(number: int) -> bool:
        async with database.transaction() as session:
            try:
                if number % 2:
                    await queue.enqueue_many(session, [JobRequest(kind="probe")], ada)
                else:
                    await queue.enqueue(session, JobRequest(kind="probe"), ada)
            except AccountLimitReached:
                return False
            return True

    assert sum(await asyncio.gather(*(ask(number) for number in range(20)))) == 3
    async with database.read_transaction() as session:
        assert await queue.count_unfinished(session, ["a" * 36, "b" * 36]) == {"a" * 36: 3}


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_no_limit_is_a_limit_too(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_LIMITS__ACCOUNT_JOBS", "null")
    get_settings.cache_clear()
    async with database.transaction() as session:
        jobs = await queue.enqueue_many(session, [JobRequest(kind="probe")] * 200, Principal(id="a", name="ada"))
    assert len(jobs) == 200


@pytest.fixture
async def busy(api: ApiClient) -> ApiClient:
    for _ in range(2):
        await queue_as(api, "ada")
    await queue_as(api, "admin")
    await api.request("bob", "POST", SCHEDULES, json={**PROBE, "name": "s", "cron": "0 3 * * *"})
    return api


async def test_a_user_sees_only_their_own_usage(busy: ApiClient) -> None:
    page = (await busy.request("ada", "GET", "/api/v1/usage")).json()
    assert page["data"] == [
        {
            "id": busy.users["ada"].id,
            "username": "ada",
            "role": "user",
            "usage": {
                "batches": {"used": 0, "limit": 1},
                "datasets_mb": {"used": 0, "limit": 1},
                "files_mb": {"used": 0, "limit": 1},
                "gpu_hours": {"used": 0, "limit": 2},
                "jobs": {"used": 2, "limit": 3},
                "models_mb": {"used": None, "limit": 1},  # MLflow does not run here
                "responses_mb": {"used": 0, "limit": 1},
                "schedules": {"used": 0, "limit": 2},
            },
        }
    ]
    assert page["has_more"] is False
    others = await busy.request("ada", "GET", "/api/v1/usage", params={"after": busy.users["bob"].id})
    assert (others.status_code, others.json()["error_code"]) == (404, "ACCOUNT_NOT_FOUND")


async def test_an_administrator_sees_the_usage_of_all_accounts(busy: ApiClient) -> None:
    seen: list[dict[str, Any]] = []
    params: dict[str, Any] = {"limit": 2}
    while True:
        page = (await busy.request("admin", "GET", "/api/v1/usage", params=params)).json()
        seen += page["data"]
        if not page["has_more"]:
            break
        params["after"] = page["last_id"]
    used = {
        one["username"]: {name: one["usage"][name]["used"] for name in ("batches", "jobs", "schedules")} for one in seen
    }
    assert used == {
        "ada": {"batches": 0, "jobs": 2, "schedules": 0},
        "bob": {"batches": 0, "jobs": 0, "schedules": 1},
        "admin": {"batches": 0, "jobs": 1, "schedules": 0},
    }
    unlimited = next(one for one in seen if one["username"] == "admin")
    assert {value["limit"] for value in unlimited["usage"].values()} == {None}
