"""The routes /v1/fine-tune, /validate and /deploy. No worker runs, so jobs stay as a test queues them."""

import asyncio
from typing import Any

import pytest

from cluster.ownership import LOCAL
from jobs import queue
from jobs.states import State
from serve.realtime.hub import Hub
from tests.support.api_client import LEARN, ApiClient
from tests.support.waiting import eventually_async

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
    forge = await api.queue_forge()
    training = await api.queue_child(forge, "fine_tune", LEARN, state=State.SUCCEEDED, result={})
    export = await api.queue_child(forge, "export", {"job_id": training}, state=State.SUCCEEDED, result={})
    spec = {"job_id": training, "export_job_id": export}
    validation = await api.queue_child(forge, "validate", spec, state=State.SUCCEEDED, result={"passed": True})
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
    passed = {"state": State.SUCCEEDED, "result": {"passed": True}}
    lenient_validation = await api.queue_job("validate", lenient_spec, "admin", **passed)
    deployment = (await api.request("admin", "POST", f"/deploy/{job}?wait=0")).json()["deployment_job_id"]
    (validation,) = (await api.get_job(deployment))["depends_on"]
    assert validation != lenient_validation
    assert (await api.get_job(validation))["spec"]["gates"] == {}
