"""The status of a training, on every route that reports it. No worker runs, so jobs stay as a test queues them."""

from typing import Any

import pytest

from cluster.ownership import Principal
from jobs.states import State
from serve.training.sessions import training_status
from tests.support.api_client import LEARN, SESSIONS, ApiClient


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


async def test_the_status_of_a_forge_job_follows_its_steps(api: ApiClient) -> None:
    async def read_status() -> tuple[str, float, float | None]:
        body = (await api.request("ada", "GET", f"/status/{forge}")).json()
        return body["status"], body["progress"], body["loss"]

    forge = await api.queue_forge(state=State.QUEUED)
    assert await read_status() == ("queued", 0, None)
    await api.update_job(forge, state=State.RUNNING, phase="fine_tune")
    assert await read_status() == ("queued", 0, None)
    training = await api.queue_child(forge, "fine_tune", LEARN)
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
        await api.queue_child(forge, kind, {"job_id": training}, state=State.RUNNING, progress=50.0)
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
    forge = await api.queue_forge()
    assert (await training_status(forge, admin))[0] == {f"job:{forge}"}
    training = await api.queue_child(forge, "fine_tune", LEARN)
    export = await api.queue_child(forge, "export", {"job_id": training})
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
