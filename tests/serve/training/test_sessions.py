"""The routes of training sessions. No worker runs, so jobs stay as a test queues them."""

import asyncio
from collections import Counter
from typing import Any

import pytest

from cluster.db import Database
from jobs.states import State
from pipelines.training import workers as training_workers
from pipelines.training.workers import TrainingWorker, WorkerNotFound
from tests.support.api_client import LEARN, SESSION, SESSIONS, ApiClient

# Sessions


async def test_a_session_is_created_read_updated_and_deleted(api: ApiClient) -> None:
    created = await api.request("ada", "POST", SESSIONS, json=SESSION)
    assert created.status_code == 201
    session = created.json()
    assert session.items() >= {**SESSION, "base_model": "forgearr/tiny", "created_by": "ada"}.items()
    unknown = {"status", "description", "worker_id", "prompt_ids", "job_id"}
    assert {name for name, value in session.items() if value is None} == unknown
    path = f"{SESSIONS}/{session['id']}"
    assert (await api.request("ada", "GET", path)).json() == session

    changed = await api.request("ada", "PUT", path, json={"name": "House v2", "description": "Again.", "config": {}})
    assert changed.json().items() >= {"name": "House v2", "description": "Again.", "config": {}}.items()
    refused = await api.request("ada", "PUT", path, json={"name": "House v3", "config": {"rank": 0}})
    assert refused.status_code == 422
    assert (await api.request("ada", "GET", path)).json()["name"] == "House v2"

    assert (await api.request("ada", "DELETE", path)).status_code == 204
    for method in ("GET", "DELETE"):
        response = await api.request("ada", method, path)
        assert (response.status_code, response.json()["error_code"]) == (404, "TRAINING_SESSION_NOT_FOUND")
    assert await api.count_kinds() == {}


async def test_sessions_are_paginated_newest_first(api: ApiClient) -> None:
    created = [await api.create_session(name=f"Number {number}") for number in range(5)]
    assert (await api.start_session(created[1])).status_code == 200
    listed: list[str] = []
    path: str | None = f"{SESSIONS}?limit=2"
    while path:
        page = (await api.request("ada", "GET", path)).json()
        assert page["total"] == 5
        listed += [session["id"] for session in page["items"]]
        path = page["links"]["next"]
    assert listed == created[::-1]
    everything = (await api.request("ada", "GET", SESSIONS)).json()["items"]
    assert {session["id"]: session["status"] for session in everything} == {
        **dict.fromkeys(created),
        created[1]: "queued",
    }
    assert (await api.request("ada", "GET", f"{SESSIONS}?skip=5")).json()["items"] == []
    for query in ("limit=0", "limit=101", "skip=-1", "skip=9999999999", "limit=x"):
        assert (await api.request("ada", "GET", f"{SESSIONS}?{query}")).status_code == 422


async def test_users_see_their_own_sessions_and_administrators_see_all(api: ApiClient) -> None:
    session = await api.create_session("ada")
    for username, count in (("ada", 1), ("bob", 0), ("admin", 1)):
        assert (await api.request(username, "GET", SESSIONS)).json()["total"] == count
    path = f"{SESSIONS}/{session}"
    for method, address, body in (
        ("GET", path, None),
        ("PUT", path, SESSION),
        ("DELETE", path, None),
        ("GET", f"{path}/status", None),
        ("POST", f"{path}/cancel", None),
        ("POST", f"{path}/start", LEARN),
        ("POST", f"{path}/start", {**LEARN, "worker_id": 1}),
    ):
        response = await api.request("bob", method, address, json=body)
        assert (response.status_code, response.json()["error_code"]) == (404, "TRAINING_SESSION_NOT_FOUND")
    assert (await api.request("admin", "GET", f"{path}/status")).json()["status"] is None
    assert await api.count_kinds() == {}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"config": {"learning_rate": -1}}, "config.learning_rate"),
        ({"config": {"num_epochs": 0}}, "config.num_epochs"),
        ({"config": {"num_epochs": "3"}}, "config.num_epochs"),
        ({"config": {"num_epochs": True}}, "config.num_epochs"),
        ({"config": {"num_epochs": None}}, "config.num_epochs"),
        ({"config": {"epochs": 1e300}}, "config.epochs"),
        ({"config": {"epochs": 1, "num_epochs": 1}}, "config.epochs"),
        ({"config": {"rank": "16"}}, "config.rank"),
        ({"config": {"rank": 1.5}}, "config.rank"),
        ({"config": {"batch_size": "many"}}, "config.batch_size"),
        ({"config": {"batch_size": 0}}, "config"),
        ({"config": {"target_modules": [1]}}, "config.target_modules"),
        ({"config": {"tags": {"a": 1}}}, "config.tags"),
        ({"config": {"pissa": True, "tuning": "full"}}, "config"),
        ({"config": {"lerning_rate": 1}}, "config.lerning_rate"),
        ({"config": {"__proto__": {}}}, "config.__proto__"),
        ({"config": {"'; DROP TABLE jobs; --": 1}}, "config.'; DROP TABLE jobs; --"),
        ({"config": {"name": "other"}}, "config.name"),
        ({"config": {"data": {"folder": "/etc"}}}, "config.data"),
        ({"config": {"base_model": "/etc"}}, "config.base_model"),
        ({"config": {"labels": {}}}, "config.labels"),
        ({"config": {str(number): number for number in range(101)}}, "config"),
        ({"config": []}, "config"),
        ({"config": None}, "config"),
        ({"name": ""}, "name"),
        ({"name": "x" * 201}, "name"),
        ({"name": 1}, "name"),
        ({"description": "x" * 10_001}, "description"),
        ({"base_model": ""}, "base_model"),
        ({"base_model": ["a"]}, "base_model"),
        ({"job_id": "job_1"}, "job_id"),
        ({"owner_id": None}, "owner_id"),
    ],
)
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_an_invalid_field_of_a_session_is_named(api: ApiClient, fields: dict[str, Any], field: str) -> None:
    response = await api.request("ada", "POST", SESSIONS, json={**SESSION, **fields})
    assert response.status_code == 422, response.text
    assert list(response.json()["details"]) == [field]
    assert field in response.json()["message"]
    assert (await api.request("ada", "GET", SESSIONS)).json()["total"] == 0


async def test_a_config_that_makes_an_invalid_spec_is_refused(api: ApiClient) -> None:
    for config in ({"cpus_per_worker": 1e-9}, {"gpus_per_worker": 1e-9}, {"tags": {"note": "x" * 1_000_000}}):
        response = await api.request("ada", "POST", SESSIONS, json={**SESSION, "config": config})
        assert (response.status_code, response.json()["error_code"]) == (422, "INVALID_JOB_SPEC")
    assert (await api.request("ada", "GET", SESSIONS)).json()["total"] == 0


async def test_unusual_session_names_are_preserved_and_yield_valid_model_names(api: ApiClient) -> None:
    for name, model in (
        ("Custom Assistant v1", "custom-assistant-v1"),
        ("'; DROP TABLE training_sessions; --", "drop-table-training_sessions"),
        ("../../etc/passwd", "etc-passwd"),
        ("<script>alert(1)</script>", "script-alert-1-script"),
        ("größer 🏠", "gr-er"),
        ("🏠" * 200, "session"),
        ("%s %(name)s {name}", "s-name-s-name"),
        ("x" * 200, "x" * 99),
    ):
        session = await api.create_session(name=name)
        assert (await api.request("ada", "GET", f"{SESSIONS}/{session}")).json()["name"] == name
        started = (await api.start_session(session)).json()
        assert (await api.get_job(started["job_id"]))["spec"]["name"] == model


async def test_an_invalid_session_id_is_not_found(api: ApiClient) -> None:
    for odd in ("'%20OR%20'1'='1", "%F0%9F%8F%A0", "-1", "00000000-0000-0000-0000-000000000000"):
        for method, last in (("GET", ""), ("GET", "/status"), ("POST", "/cancel"), ("DELETE", "")):
            assert (await api.request("admin", method, f"{SESSIONS}/{odd}{last}")).status_code == 404
    assert (await api.request("admin", "GET", f"{SESSIONS}/{'x' * 41}")).status_code == 422
    assert (await api.request("admin", "GET", f"{SESSIONS}/%00")).status_code == 400


# Starting


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"worker_id": None}, 400, "INVALID_REQUEST"),
        ({"prompt_ids": None, "data": None}, 400, "INVALID_REQUEST"),
        ({"prompt_ids": [1], **LEARN}, 400, "INVALID_REQUEST"),
        ({"prompt_ids": []}, 422, "VALIDATION_ERROR"),
        ({"prompt_ids": ["1"]}, 422, "VALIDATION_ERROR"),
        ({"prompt_ids": [True]}, 422, "VALIDATION_ERROR"),
        ({"prompt_ids": [1.5]}, 422, "VALIDATION_ERROR"),
        ({"prompt_ids": "all"}, 422, "VALIDATION_ERROR"),
        ({"prompt_ids": [0, -1, 2**31, 2**63]}, 404, "PROMPT_NOT_FOUND"),
        ({"prompt_ids": [12345]}, 404, "PROMPT_NOT_FOUND"),
        ({"data": {}}, 422, "VALIDATION_ERROR"),
        ({"data": {"prompts": {}}}, 422, "VALIDATION_ERROR"),
        ({"data": {"dataset": "demo/homelab", "folder": "/etc"}}, 422, "VALIDATION_ERROR"),
        ({"data": {"dataset": "nowhere"}}, 404, "DATASET_NOT_FOUND"),
        ({"data": {"dataset": "' OR 1=1 --"}}, 404, "DATASET_NOT_FOUND"),
        ({"data": {"folder": "/etc"}}, 403, "FOLDER_FORBIDDEN"),
        ({"data": {"folder": "etc"}}, 422, "VALIDATION_ERROR"),
        ({**LEARN, "worker_id": 0}, 422, "VALIDATION_ERROR"),
        ({**LEARN, "worker_id": 2**31}, 422, "VALIDATION_ERROR"),
        ({**LEARN, "worker_id": "1"}, 422, "VALIDATION_ERROR"),
        ({**LEARN, "force": True}, 422, "VALIDATION_ERROR"),
    ],
)
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_an_invalid_start_is_refused_and_changes_nothing(
    api: ApiClient, fields: dict[str, Any], status: int, code: str
) -> None:
    session = await api.create_session()
    before = (await api.request("ada", "GET", f"{SESSIONS}/{session}")).json()
    response = await api.start_session(session, **fields)
    assert (response.status_code, response.json()["error_code"]) == (status, code), response.text
    assert (await api.request("ada", "GET", f"{SESSIONS}/{session}")).json() == before
    assert await api.count_kinds() == {}


async def test_prompts_of_other_users_are_not_found(api: ApiClient) -> None:
    prompt = await api.create_prompt("bob")
    session = await api.create_session("ada")
    assert (await api.start_session(session, prompt_ids=[prompt])).status_code == 404
    assert (await api.start_session(session, username="admin", prompt_ids=[prompt])).status_code == 200


async def test_a_session_starts_with_the_given_prompts_and_worker(api: ApiClient) -> None:
    async with api.database.transaction() as transaction:
        transaction.add(TrainingWorker(id=7, node="nas", label=training_workers.NODE_LABEL))
    prompt, session = await api.create_prompt(), await api.create_session()
    unknown = await api.start_session(session, prompt_ids=[prompt], worker_id=8)
    assert unknown.status_code == 503  # there is no cluster to find it in
    started = (await api.start_session(session, prompt_ids=[prompt], worker_id=7)).json()
    expected = {"status": "queued", "worker_id": 7, "prompt_ids": [prompt]}
    assert started.items() >= expected.items()
    job = await api.get_job(started["job_id"])
    assert (job["kind"], job["created_by"]) == ("fine_tune", "ada")
    assert job["spec"]["labels"] == {training_workers.NODE_LABEL: "nas"}
    assert job["spec"]["data"]["prompts"]["ids"] == [prompt]
    assert (job["spec"]["epochs"], job["spec"]["batch_size"]) == (4, 2)


async def test_an_unknown_worker_is_not_found(database: Database) -> None:
    async with database.transaction() as session:
        with pytest.raises(WorkerNotFound):
            await training_workers.labels_of(session, 8)


async def test_an_active_session_cannot_be_changed_deleted_or_started(api: ApiClient) -> None:
    session = await api.create_session()
    path = f"{SESSIONS}/{session}"
    refused = await api.request("ada", "POST", f"{path}/cancel")
    assert refused.status_code == 409
    job = (await api.start_session(session)).json()["job_id"]
    for state in (State.QUEUED, State.RUNNING, State.PAUSED):
        await api.update_job(job, state=state)
        for response in (
            await api.start_session(session),
            await api.request("ada", "PUT", path, json=SESSION),
            await api.request("ada", "DELETE", path),
        ):
            assert (response.status_code, response.json()["error_code"]) == (409, "TRAINING_SESSION_STARTED")
    cancelled = await api.request("ada", "POST", f"{path}/cancel")
    assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
    assert (await api.request("ada", "POST", f"{path}/cancel")).status_code == 409
    again = await api.start_session(session)
    assert (again.status_code, again.json()["job_id"] != job) == (200, True)
    assert (await api.request("ada", "PUT", path, json=SESSION)).status_code == 409
    await api.update_job(again.json()["job_id"], state=State.FAILED, error={"code": "x", "message": "No."})
    assert (await api.request("ada", "DELETE", path)).status_code == 204
    assert await api.count_kinds() == {"fine_tune": 2}


async def test_simultaneous_starts_queue_one_job(api: ApiClient) -> None:
    session = await api.create_session()
    responses = await asyncio.gather(*(api.start_session(session) for _ in range(8)))
    assert Counter(response.status_code for response in responses) == {200: 1, 409: 7}
    assert await api.count_kinds() == {"fine_tune": 1}


async def test_simultaneous_operations_on_a_session_cause_no_server_error(api: ApiClient) -> None:
    for _ in range(3):
        path = f"{SESSIONS}/{await api.create_session()}"
        operations: list[tuple[str, str, Any]] = [
            ("POST", f"{path}/start", LEARN),
            ("DELETE", path, None),
            ("PUT", path, SESSION),
            ("POST", f"{path}/cancel", None),
            ("GET", f"{path}/status", None),
        ]
        requests = [api.request("ada", method, address, json=body) for method, address, body in operations * 3]
        statuses = {response.status_code for response in await asyncio.gather(*requests)}
        assert statuses <= {200, 204, 404, 409}


# Bodies


async def test_malformed_bodies_are_refused(api: ApiClient) -> None:
    session = await api.create_session()
    paths = (SESSIONS, f"{SESSIONS}/{session}/start", "/v1/fine-tune")
    for path in paths:
        for body, status in (
            (b"", {422}),
            (b"[]", {422}),
            (b"null", {422}),
            (b'"text"', {422}),
            (b"{", {400}),
            (b"\xff\xfe", {400}),
            (b'{"name": "\\u0000"}', {400}),
            (b'{"name": NaN}', {400}),
            (b'{"config": ' + b'{"tags": ' * 200 + b"1" + b"}" * 201, {400}),
            (b'{"config": ' + b"[" * 100_000, {400}),
            (b'{"name": "' + b"x" * (33 * 1024 * 1024) + b'"}', {413}),
            (b'{"name": "' + b"x" * (4 * 1024 * 1024) + b'"}', {422}),
        ):
            response = await api.request("ada", "POST", path, content=body)
            assert response.status_code in status, (path, body[:40], response.text[:300])
    assert await api.count_kinds() == {}
