"""The routes of trainings: responses, refusals and queued jobs. No worker runs, so jobs stay as a test queues them."""

import asyncio
from collections import Counter
from typing import Any

import pytest

from cluster.db import Database
from cluster.ownership import LOCAL, Principal
from jobs import queue
from jobs.states import State
from pipelines.training import workers as training_workers
from pipelines.training.workers import TrainingWorker, WorkerNotFound
from serve.realtime.hub import Hub
from serve.training.sessions import training_status
from tests.support.api_client import LEARN, SESSION, SESSIONS, ApiClient
from tests.support.waiting import eventually_async

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


# Progress


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ({"state": State.QUEUED}, "queued"),
        ({"state": State.RUNNING, "phase": None}, "preparing"),
        ({"state": State.RUNNING, "phase": "gathering the data"}, "preparing"),
        ({"state": State.RUNNING, "phase": "training"}, "training"),
        ({"state": State.RUNNING, "phase": "saving the model"}, "training"),
        ({"state": State.PAUSED, "phase": "training"}, "paused"),
        ({"state": State.SUCCEEDED, "progress": 100.0}, "completed"),
        ({"state": State.FAILED, "error": {"code": "out_of_memory", "message": "Too large."}}, "failed"),
        ({"state": State.CANCELLED, "error": {"code": "cancelled", "message": "Cancelled."}}, "cancelled"),
    ],
)
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_all_routes_report_the_same_status_of_a_training(
    api: ApiClient, values: dict[str, Any], status: str
) -> None:
    session = await api.create_session()
    job = (await api.start_session(session)).json()["job_id"]
    await api.update_job(job, **values)
    body = (await api.request("ada", "GET", f"/status/{job}")).json()
    assert body["status"] == status
    assert body["error"] == values.get("error", {}).get("message")
    assert (body["current_epoch"], body["total_epochs"], body["current_step"], body["loss"]) == (
        None,
        4,
        None,
        None,
    )
    session_status = (await api.request("ada", "GET", f"{SESSIONS}/{session}/status")).json()
    assert session_status == {
        "session_id": session,
        **{name: body[name] for name in session_status if name != "session_id"},
    }
    assert body.keys() - session_status.keys() == {"job_id", "created_at", "updated_at"}
    assert (await api.request("ada", "GET", f"{SESSIONS}/{session}")).json()["status"] == status
    assert (await api.request("ada", "GET", SESSIONS)).json()["items"][0]["status"] == status


async def test_the_status_contains_the_latest_metrics(api: ApiClient) -> None:
    job = await api.queue_training(state=State.RUNNING, phase="training", progress=41.67, result=None)
    await api.report_metrics(job, step=9, epoch=0.9, loss=2.5, eval_loss=2.0, memory_mb=512.0)
    await api.report_metrics(job, step=10, epoch=1.0, loss=2.25, learning_rate=1e-4, unheard_of=1)
    body = (await api.request("ada", "GET", f"/status/{job}")).json()
    expected = {
        "progress": 41.67,
        "current_step": 10,
        "current_epoch": 1,  # at its very end
        "total_epochs": 3,
        "loss": 2.25,
        "eval_loss": 2.0,
        "learning_rate": 1e-4,
        "memory_mb": 512.0,
        "eta_seconds": None,
        "gpu_utilization": None,
    }
    assert body.items() >= expected.items()
    assert "unheard_of" not in body


async def test_the_last_evaluation_is_reported_after_many_later_steps(api: ApiClient) -> None:
    job = await api.queue_training(state=State.RUNNING, phase="training", result=None)
    await api.report_metrics(job, step=10, epoch=1.0, eval_loss=2.5)
    await api.report_metrics(job, step=20, epoch=2.0, eval_loss=2.0)
    for step in range(21, 46):
        await api.report_metrics(job, step=step, epoch=2.0 + step / 100, loss=1.0)
    assert (await api.request("ada", "GET", f"/status/{job}")).json()["eval_loss"] == 2.0
    job = await api.queue_training(state=State.RUNNING, phase="training", result=None)
    await api.report_metrics(job, step=40, epoch=4.0, loss=1.0)  # no held-out split
    assert (await api.request("ada", "GET", f"/status/{job}")).json()["eval_loss"] is None


@pytest.mark.parametrize(
    ("epoch", "max_steps", "current"),
    [(0.0, None, 1), (0.1, None, 1), (1.0, None, 1), (1.1, None, 2), (3.0, None, 3), (1.0, 5, 1), (1.2, 5, 2)],
)
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_the_end_of_an_epoch_counts_as_that_epoch(
    api: ApiClient, epoch: float, max_steps: int | None, current: int
) -> None:
    job = await api.queue_job("fine_tune", {**LEARN, "max_steps": max_steps}, state=State.RUNNING)
    await api.report_metrics(job, step=4, epoch=epoch)
    assert (await api.request("ada", "GET", f"/status/{job}")).json()["current_epoch"] == current


async def test_a_session_with_max_steps_has_no_total_epochs(api: ApiClient) -> None:
    session = await api.create_session(config={"max_steps": 5})
    path = f"{SESSIONS}/{session}/status"
    assert (await api.request("ada", "GET", path)).json()["total_epochs"] is None
    await api.start_session(session)
    assert (await api.request("ada", "GET", path)).json()["total_epochs"] is None


async def queue_forge(api: ApiClient, **values: Any) -> str:
    return await api.queue_job("forge", {**LEARN, "deploy": False}, **{"state": State.RUNNING} | values)


async def queue_child(api: ApiClient, parent: str, kind: str, spec: dict[str, Any], **values: Any) -> str:
    return await api.queue_job(kind, spec, **{"parent_id": parent, "child_name": kind} | values)


async def test_the_status_of_a_forge_job_follows_its_steps(api: ApiClient) -> None:
    async def read_status() -> tuple[str, float, float | None]:
        body = (await api.request("ada", "GET", f"/status/{forge}")).json()
        return body["status"], body["progress"], body["loss"]

    forge = await queue_forge(api, state=State.QUEUED)
    assert await read_status() == ("queued", 0, None)
    await api.update_job(forge, state=State.RUNNING, phase="fine_tune")
    assert await read_status() == ("queued", 0, None)
    training = await queue_child(api, forge, "fine_tune", LEARN)
    assert await read_status() == ("queued", 0, None)
    await api.update_job(training, state=State.RUNNING, phase="gathering the data")
    assert await read_status() == ("preparing", 0, None)
    await api.update_job(training, phase="training", progress=50.0)
    await api.report_metrics(training, step=3, epoch=1.5, loss=2.0)
    assert await read_status() == ("training", 30, 2.0)
    await api.update_job(training, state=State.PAUSED)
    assert await read_status() == ("paused", 30, 2.0)
    await api.update_job(training, state=State.SUCCEEDED, progress=100.0)
    steps = (("export", "exporting", 67.5), ("validate", "validating", 82.5))
    for kind, status, progress in steps:
        await api.update_job(forge, phase=kind)
        await queue_child(api, forge, kind, {"job_id": training}, state=State.RUNNING, progress=50.0)
        assert await read_status() == (status, progress, 2.0)
    await api.update_job(forge, phase="deploy")
    assert (await read_status())[0] == "deploying"
    await api.update_job(forge, state=State.SUCCEEDED, progress=100.0)
    assert await read_status() == ("completed", 100, 2.0)
    for state, status in ((State.PAUSED, "paused"), (State.CANCELLED, "cancelled"), (State.FAILED, "failed")):
        await api.update_job(forge, state=state)
        assert (await read_status())[0] == status


async def test_the_rooms_of_a_forge_job_include_those_of_its_steps(api: ApiClient) -> None:
    admin = Principal(id=api.users["admin"].id, name="admin", is_admin=True)
    forge = await queue_forge(api)
    assert (await training_status(forge, admin))[0] == {f"job:{forge}"}
    training = await queue_child(api, forge, "fine_tune", LEARN)
    export = await queue_child(api, forge, "export", {"job_id": training})
    assert (await training_status(forge, admin))[0] == {f"job:{forge}", f"job:{training}", f"job:{export}"}


async def test_a_job_of_another_kind_is_not_a_training(api: ApiClient) -> None:
    job = await api.queue_job("probe", {})
    for method, path in (("GET", "/status"), ("POST", "/validate"), ("POST", "/deploy")):
        response = await api.request("admin", method, f"{path}/{job}")
        assert (response.status_code, response.json()["error_code"]) == (404, "TRAINING_NOT_FOUND")
        assert "probe" in response.json()["message"]
    assert await api.count_kinds() == {"probe": 1}


async def test_a_training_of_another_user_is_not_found(api: ApiClient) -> None:
    job = await api.queue_training("ada")
    for method, path in (("GET", "/status"), ("POST", "/validate")):
        assert (await api.request("bob", method, f"{path}/{job}")).status_code == 404
        assert (await api.request("ada", method, f"{path}/{job}?wait=0")).status_code in {200, 202}


# /v1/fine-tune


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"data": None}, 400),
        ({"learning_rate": 0}, 422),
        ({"learning_rate": "0.1"}, 422),
        ({"epochs": True}, 422),
        ({"rank": 2**70}, 422),
        ({"seed": -1}, 422),
        ({"workers": 0}, 422),
        ({"use_pissa": "yes"}, 422),
        ({"pissa": True}, 422),
        ({"name": "other"}, 422),
        ({"project_name": "../x"}, 422),
        ({"project_name": "x\n"}, 422),
        ({"cpus_per_worker": 1e-9}, 422),
        ({"labels": {"": "x"}}, 422),
        ({"labels": {"zone": "x" * 1000}}, 422),
        ({"tags": {"note": "x" * 1_000_000}}, 422),
        ({"base_model": "/etc"}, 403),
        ({"data": {"folder": "/etc"}}, 403),
    ],
)
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_an_invalid_fine_tuning_request_is_refused(api: ApiClient, fields: dict[str, Any], status: int) -> None:
    response = await api.request("ada", "POST", "/v1/fine-tune", json={"project_name": "house", **LEARN, **fields})
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"] == response.json()["detail"]
    assert await api.count_kinds() == {}


@pytest.mark.parametrize("method", ["supervised", "dpo"])
async def test_data_that_does_not_fit_the_method_is_refused(api: ApiClient, method: str) -> None:
    pair = '{"messages": [{"role": "user", "content": "Hi."}], "chosen": "Good day.", "rejected": "What?"}'
    path = "/api/v1/datasets?name=pairs"
    assert (await api.request("ada", "POST", path, content=pair)).status_code == 201
    data, other = {"dataset": "pairs"}, {"dataset": "demo/homelab"}
    fitting, unfit = (data, other) if method == "dpo" else (other, data)
    body = {"project_name": "house", "method": method}
    refused = await api.request("ada", "POST", "/v1/fine-tune", json={**body, "data": unfit})
    assert refused.status_code == 400
    assert method in refused.json()["detail"]
    session = await api.create_session(config={"method": method})
    response = await api.start_session(session, data=unfit)
    assert (response.status_code, response.json()["error_code"]) == (400, "WRONG_KIND_OF_DATA")
    assert await api.count_kinds() == {}
    assert (await api.request("ada", "POST", "/v1/fine-tune", json={**body, "data": fitting})).status_code == 200
    assert (await api.start_session(session, data=fitting)).status_code == 200


# /validate


async def test_a_step_gets_the_resources_of_one_training_process(api: ApiClient) -> None:
    spec = {**LEARN, "cpus_per_worker": 4, "gpus_per_worker": 2}
    job = await api.queue_job("fine_tune", spec, state=State.SUCCEEDED, result={})
    deployment = (await api.request("admin", "POST", f"/deploy/{job}?wait=0")).json()["deployment_job_id"]
    (validation,) = (await api.get_job(deployment))["depends_on"]
    (export,) = (await api.get_job(validation))["depends_on"]
    async with api.database.read_transaction() as session:
        for step, demand in ((validation, "4 CPU, 1 GPU"), (export, "4 CPU")):
            assert (await queue.get(session, step, LOCAL)).demand == demand


async def test_a_training_is_validated_once(api: ApiClient) -> None:
    job = await api.queue_training()
    requests = [api.request("ada", "POST", f"/validate/{job}?wait=0") for _ in range(6)]
    responses = await asyncio.gather(*requests)
    assert {response.status_code for response in responses} == {202}
    (validation,) = {response.json()["validation_job_id"] for response in responses}
    assert responses[0].json() == {
        "job_id": job,
        "passed": None,
        "metrics": {},
        "report_path": None,
        "reasons": [],
        "validation_job_id": validation,
    }
    metrics = {"final_loss": 1.23, "perplexity": 3.42, "gguf_kl": None}
    result = {"passed": False, "reasons": ["too dull"], "metrics": metrics, "report_path": "validation_report.md"}
    await api.update_job(validation, state=State.SUCCEEDED, result={**result, "report_json": "report.json"})
    finished = await api.request("ada", "POST", f"/validate/{job}")
    assert finished.status_code == 200
    assert finished.json() == {"job_id": job, **result, "validation_job_id": validation}
    assert await api.count_kinds() == {"fine_tune": 1, "validate": 1}


async def test_a_failed_validation_reports_its_reason_and_can_be_repeated(api: ApiClient) -> None:
    job = await api.queue_training()
    first = (await api.request("ada", "POST", f"/validate/{job}?wait=0")).json()["validation_job_id"]
    waiting = asyncio.create_task(api.request("ada", "POST", f"/validate/{job}?wait=600"))
    hub: Hub = api.app.state.hub
    await eventually_async(lambda: hub.listeners(f"job:{first}"))
    await api.update_job(first, state=State.FAILED, error={"code": "out_of_memory", "message": "Too large."})
    hub._deliver({"rooms": [f"job:{first}"]})  # pyright: ignore[reportPrivateUsage]
    failed = await waiting
    assert failed.status_code == 200
    assert failed.json().items() >= {"passed": None, "metrics": {}, "reasons": ["Too large."]}.items()
    again = await api.request("ada", "POST", f"/validate/{job}?wait=0")
    assert again.status_code == 202
    assert again.json()["validation_job_id"] != first


async def test_an_unsuccessful_training_is_neither_validated_nor_deployed(api: ApiClient) -> None:
    for state in (State.FAILED, State.CANCELLED):
        job = await api.queue_training(state=state, error={"code": "x", "message": "No."})
        for path in ("validate", "deploy"):
            response = await api.request("admin", "POST", f"/{path}/{job}")
            assert (response.status_code, response.json()["error_code"]) == (409, "JOB_HAS_NO_RESULT")
    assert await api.count_kinds() == {"fine_tune": 2}


async def test_steps_wait_for_the_training(api: ApiClient) -> None:
    job = await api.queue_training(state=State.RUNNING)
    step = (await api.request("ada", "POST", f"/validate/{job}?wait=0")).json()["validation_job_id"]
    assert (await api.get_job(step))["depends_on"] == [job]


async def test_a_validation_queued_by_another_user_is_not_reused(api: ApiClient) -> None:
    job = await api.queue_training("ada")
    bobs = await api.queue_job("validate", {"job_id": job}, "bob")  # it will fail: bob does not own the training
    own = (await api.request("ada", "POST", f"/validate/{job}?wait=0")).json()["validation_job_id"]
    assert own != bobs
    second = await api.queue_training("ada")
    admins = await api.queue_job("validate", {"job_id": second}, "admin")
    assert (await api.request("ada", "POST", f"/validate/{second}?wait=0")).json()["validation_job_id"] == admins


@pytest.mark.parametrize("wait", ["-1", "601", "nan", "inf", "1e999", "x", ""])
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_an_invalid_wait_is_refused(api: ApiClient, wait: str) -> None:
    job = await api.queue_training()
    for path in ("validate", "deploy"):
        assert (await api.request("admin", "POST", f"/{path}/{job}", params={"wait": wait})).status_code == 422
    assert await api.count_kinds() == {"fine_tune": 1}


# /deploy


async def test_only_administrators_deploy(api: ApiClient) -> None:
    job = await api.queue_training("ada")
    refused = await api.request("ada", "POST", f"/deploy/{job}?wait=0")
    assert refused.status_code == 403
    assert await api.count_kinds() == {"fine_tune": 1}


async def test_a_deployment_queues_each_of_its_three_steps_once(api: ApiClient) -> None:
    job = await api.queue_training("ada")
    responses = await asyncio.gather(*(api.request("admin", "POST", f"/deploy/{job}?wait=0") for _ in range(6)))
    assert {response.status_code for response in responses} == {202}
    (deployment,) = {response.json()["deployment_job_id"] for response in responses}
    assert responses[0].json() == {
        "job_id": job,
        "success": None,
        "model_name": None,
        "gguf_path": None,
        "message": None,
        "deployment_job_id": deployment,
    }
    assert await api.count_kinds() == {"fine_tune": 1, "export": 1, "validate": 1, "deploy": 1}
    (validation,) = (await api.get_job(deployment))["depends_on"]
    (export,) = (await api.get_job(validation))["depends_on"]
    assert (await api.get_job(export))["depends_on"] == [job]
    assert (await api.get_job(validation))["spec"]["export_job_id"] == export

    # A forced deployment is another job, but it shares the steps before it.
    await api.request("admin", "POST", f"/deploy/{job}?wait=0&force=true")
    assert await api.count_kinds() == {"fine_tune": 1, "export": 1, "validate": 1, "deploy": 2}
    # A validation that includes the export is reused.
    measured = await api.request("ada", "POST", f"/validate/{job}?wait=0")
    assert measured.json()["validation_job_id"] == validation


async def test_a_deployment_reports_its_outcome_and_reuses_finished_steps(api: ApiClient) -> None:
    job = await api.queue_training("ada")
    outcomes: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (
            {"state": State.FAILED, "error": {"code": "version_not_passed", "message": "Too dull."}},
            {"success": False, "model_name": None, "gguf_path": None, "message": "Too dull."},
        ),
        (
            {"state": State.SUCCEEDED, "result": {"model_name": "forgearr:latest", "gguf_path": "/cache/a.gguf"}},
            {"success": True, "model_name": "forgearr:latest", "gguf_path": "/cache/a.gguf", "message": None},
        ),
    ]
    hub: Hub = api.app.state.hub
    for values, expected in outcomes:
        step = (await api.request("admin", "POST", f"/deploy/{job}?wait=0")).json()["deployment_job_id"]
        waiting = asyncio.create_task(api.request("admin", "POST", f"/deploy/{job}?wait=600"))
        await eventually_async(lambda room=f"job:{step}": hub.listeners(room))
        await api.update_job(step, **values)
        hub._deliver({"rooms": [f"job:{step}"]})  # pyright: ignore[reportPrivateUsage]
        response = await waiting
        assert response.status_code == 200
        assert response.json() == {"job_id": job, **expected, "deployment_job_id": step}
    assert await api.count_kinds() == {"fine_tune": 1, "export": 1, "validate": 1, "deploy": 2}


async def test_finished_steps_of_a_forge_job_are_reused(api: ApiClient) -> None:
    forge = await queue_forge(api)
    training = await queue_child(api, forge, "fine_tune", LEARN, state=State.SUCCEEDED, result={})
    export = await queue_child(api, forge, "export", {"job_id": training}, state=State.SUCCEEDED, result={})
    spec = {"job_id": training, "export_job_id": export}
    validation = await queue_child(api, forge, "validate", spec, state=State.SUCCEEDED, result={"passed": True})
    # A later failure of the forge job does not matter.
    await api.update_job(forge, state=State.FAILED, error={"code": "x", "message": "No."})
    for named in (forge, training):
        response = await api.request("ada", "POST", f"/validate/{named}")
        assert (response.status_code, response.json()["validation_job_id"]) == (200, validation)
        assert (await api.request("admin", "POST", f"/deploy/{named}?wait=0")).status_code == 202
    assert await api.count_kinds() == {"forge": 1, "fine_tune": 1, "export": 1, "validate": 1, "deploy": 1}


async def test_a_deployment_does_not_reuse_a_validation_with_custom_gates(api: ApiClient) -> None:
    job = await api.queue_training("ada")
    export = await api.queue_job("export", {"job_id": job}, state=State.SUCCEEDED, result={})
    lenient_spec = {"job_id": job, "export_job_id": export, "gates": {"max_perplexity": None}}
    lenient_validation = await api.queue_job("validate", lenient_spec, state=State.SUCCEEDED, result={"passed": True})
    deployment = (await api.request("admin", "POST", f"/deploy/{job}?wait=0")).json()["deployment_job_id"]
    (validation,) = (await api.get_job(deployment))["depends_on"]
    assert validation != lenient_validation
    assert (await api.get_job(validation))["spec"]["gates"] == {}


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
