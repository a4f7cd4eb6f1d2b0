"""Fine-tuning on a whole platform: progress, tracking, pause and resume, crashes, and sessions."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect

from tests.support.platform import Platform, running_platform
from tests.support.waiting import TIMEOUT, WEBSOCKET_OPTIONS, eventually

pytestmark = [pytest.mark.platform, pytest.mark.deep]

SERVICES = ["Sonarr", "Radarr", "Plex"]
SPEC = {"epochs": 4, "batch_size": 4, "learning_rate": 2e-3}
LONG = {"epochs": 4000, "batch_size": 4, "learning_rate": 1e-3, "checkpoint_steps": 20}


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with running_platform() as platform:
        yield platform


@pytest.fixture(scope="module")
def dataset(platform: Platform) -> str:
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"Which service is number {number}?"},
                    {"role": "assistant", "content": f"Number {number} is {SERVICES[number % 3]}."},
                ]
            }
        )
        for number in range(24)
    ]
    response = platform.http.post("/api/v1/datasets", params={"name": "services"}, content="\n".join(lines))
    assert response.status_code == 201, response.text
    return response.json()["id"]


def status(platform: Platform, job_id: str) -> dict[str, Any]:
    response = platform.http.get(f"/status/{job_id}")
    assert response.status_code == 200, response.text
    return response.json()


def losses_of(platform: Platform, job_id: str) -> dict[int, float]:
    """Return the loss at each step, from the job's events. A step that was reported twice is an error."""
    losses: dict[int, float] = {}
    for event in platform.events(job_id, "progress"):
        values = event["data"].get("metrics", {})
        if "loss" in values:
            assert int(values["step"]) not in losses, f"step {values['step']} was trained twice"
            losses[int(values["step"])] = values["loss"]
    return losses


def test_a_fine_tune_reduces_the_loss_and_reports_progress(platform: Platform, dataset: str) -> None:
    request = {
        "project_name": "services",
        "base_model": "forgearr/tiny",
        "epochs": 4,
        "learning_rate": 0.002,
        "rank": 8,
        "use_pissa": True,
        "batch_size": 4,
        "data": {"dataset": dataset},
    }
    response = platform.http.post("/v1/fine-tune", json=request)
    assert response.status_code == 200, response.text
    assert response.json()["status"] == "queued"
    job_id = response.json()["job_id"]

    with connect(f"ws{platform.url.removeprefix('http')}/ws/training/{job_id}", **WEBSOCKET_OPTIONS) as socket:
        messages = [json.loads(socket.recv(timeout=TIMEOUT))]
        while messages[-1]["status"] not in {"completed", "failed"}:
            messages.append(json.loads(socket.recv(timeout=TIMEOUT)))
    assert messages[-1]["status"] == "completed", messages[-1]
    assert {message["status"] for message in messages} <= {"queued", "preparing", "training", "completed"}
    assert [message["progress"] for message in messages] == sorted(message["progress"] for message in messages)

    final = status(platform, job_id)
    assert (final["status"], final["progress"], final["current_epoch"], final["total_epochs"]) == (
        "completed",
        100,
        4,
        4,
    )
    assert final["current_step"] == 24
    losses = losses_of(platform, job_id)
    assert list(losses) == list(range(1, 25))
    assert final["loss"] == pytest.approx(losses[24])
    assert losses[24] < losses[1]

    result = platform.job(job_id)["result"]
    assert result["dataset"] == {
        "id": dataset,
        "digest": result["dataset"]["digest"],
        "samples": 24,
        "train": 22,
        "held_out": 2,
        "truncated": 0,
        "skipped": 0,
    }
    assert (Path(result["model"]) / "adapter_model.safetensors").exists()
    stored = Path(result["model"]).parents[1]
    assert stored.name == job_id
    assert [*stored.glob("*/checkpoints/*")] == []  # checkpoints are deleted at the end


def test_mlflow_has_the_parameters_metrics_dataset_and_files_of_a_run(platform: Platform, dataset: str) -> None:
    job_id = platform.submit("fine_tune", spec={**SPEC, "data": {"dataset": dataset}})
    platform.wait_for(job_id, "succeeded", "failed")
    run_id = eventually(lambda: platform.job(job_id)["mlflow_run_id"])

    def finished() -> dict[str, Any] | None:
        run = platform.http.get(f"{platform.mlflow_url}/api/2.0/mlflow/runs/get", params={"run_id": run_id}).json()[
            "run"
        ]
        return run if run["info"]["status"] == "FINISHED" else None

    run = eventually(finished)
    parameters = {item["key"]: item["value"] for item in run["data"]["params"]}
    assert (parameters["learning_rate"], parameters["data.dataset"]) == ("0.002", dataset)
    assert {"loss", "learning_rate", "grad_norm", "eval_loss", "tokens_per_second"} <= {
        item["key"] for item in run["data"]["metrics"]
    }
    (used,) = run["inputs"]["dataset_inputs"]
    assert used["dataset"]["name"] == "services"
    files = platform.http.get(f"{platform.mlflow_url}/api/2.0/mlflow/artifacts/list", params={"run_id": run_id}).json()
    assert {"loss.png", "adapter_model.safetensors", "environment.json", "result.json"} <= {
        item["path"] for item in files["files"]
    }


def test_several_workers_train_together(platform: Platform, dataset: str) -> None:
    job_id = platform.submit("fine_tune", spec={**SPEC, "workers": 2, "data": {"dataset": dataset}})
    job = platform.wait_for(job_id)
    assert job["state"] == "succeeded", job["error"]
    assert job["result"]["steps"] == 12  # each worker takes half of a step's samples
    assert list(losses_of(platform, job_id)) == list(range(1, 13))


def test_a_training_resumes_from_its_checkpoint_after_a_pause_and_a_kill(platform: Platform, dataset: str) -> None:
    spec = {**LONG, "data": {"dataset": dataset}}
    job_id = platform.submit("fine_tune", spec=spec)
    eventually(lambda: status(platform, job_id)["current_step"])
    platform.http.post(f"/api/v1/jobs/{job_id}/pause").raise_for_status()
    platform.wait_for(job_id, "paused")
    paused_at = status(platform, job_id)
    assert paused_at["status"] == "paused"
    assert paused_at["current_step"] < 24_000
    platform.http.post(f"/api/v1/jobs/{job_id}/resume").raise_for_status()

    def progressed() -> int | None:
        step = status(platform, job_id)["current_step"]
        return step if step > paused_at["current_step"] + 50 else None

    eventually(progressed)
    platform.kill("ray::Worker")  # also those of light jobs
    platform.wait_for(job_id, "running")
    eventually(lambda: status(platform, job_id)["current_step"] > paused_at["current_step"] + 100)
    platform.http.post(f"/api/v1/jobs/{job_id}/cancel").raise_for_status()
    job = platform.wait_for(job_id)
    assert (job["state"], job["attempt"]) == ("cancelled", 1)
    assert status(platform, job_id)["status"] == "cancelled"


def test_a_session_is_created_started_followed_and_cancelled(platform: Platform) -> None:
    http = platform.http
    prompts = [
        http.post(
            "/api/training/prompts",
            json={"name": f"Prompt {number}", "user_input": f"Number {number}?", "expected_output": "Plex."},
        ).json()["id"]
        for number in range(10)
    ]
    request = {
        "name": "Custom Assistant v1",
        "description": "Homelab-specific training",
        "base_model": "forgearr/tiny",
        "config": {"num_epochs": 10_000, "learning_rate": 2e-4, "batch_size": 4},
    }
    created = http.post("/api/training/sessions", json=request)
    assert created.status_code == 201, created.text
    session = created.json()["id"]
    assert http.get(f"/api/training/sessions/{session}/status").json()["status"] is None
    (worker,) = http.get("/api/training/workers").json()
    assert (worker["id"], worker["status"], worker["gpus"]) == (1, "online", 0)

    without_prompts = http.post(f"/api/training/sessions/{session}/start", json={"worker_id": 1})
    assert without_prompts.status_code == 400
    unknown_worker = http.post(f"/api/training/sessions/{session}/start", json={"worker_id": 77, "prompt_ids": prompts})
    assert unknown_worker.status_code == 404

    with connect(f"ws{platform.url.removeprefix('http')}/ws/training/{session}", **WEBSOCKET_OPTIONS) as socket:
        assert json.loads(socket.recv(timeout=TIMEOUT))["status"] is None
        started = http.post(f"/api/training/sessions/{session}/start", json={"worker_id": 1, "prompt_ids": prompts})
        assert started.status_code == 200, started.text
        while (message := json.loads(socket.recv(timeout=TIMEOUT)))["status"] != "training":
            assert message["status"] in {"queued", "preparing"}, message
    assert platform.job(started.json()["job_id"])["spec"]["labels"].keys() == {"forgearr.io/node"}

    second_start = http.post(f"/api/training/sessions/{session}/start", json={"prompt_ids": prompts})
    assert second_start.status_code == 409
    assert http.put(f"/api/training/sessions/{session}", json=request).status_code == 409
    assert http.delete(f"/api/training/sessions/{session}").status_code == 409
    http.post(f"/api/training/sessions/{session}/cancel").raise_for_status()
    cancelled = lambda: http.get(f"/api/training/sessions/{session}/status").json()["status"] == "cancelled" or None  # noqa: E731
    eventually(cancelled)
    assert http.delete(f"/api/training/sessions/{session}").status_code == 204
    assert http.get(f"/api/training/sessions/{session}").status_code == 404


@pytest.mark.parametrize(
    ("change", "status_code", "message"),
    [
        ({"data": None}, 400, "Training data is missing"),
        ({"data": {"dataset": "nowhere"}}, 404, "nowhere"),
        ({"data": {"prompts": {"tags": ["no-such-tag"]}}}, 400, "no-such-tag"),
        ({"data": {"dataset": "services", "folder": "/etc"}}, 422, "exactly one"),
        ({"project_name": "No Such Name!"}, 422, "project_name"),
        ({"learning_rate": -1}, 422, "learning_rate"),
        ({"batch_size": 0}, 422, "batch_size"),
        ({"unknown": 1}, 422, "unknown"),
    ],
)
def test_an_invalid_fine_tune_request_is_refused(
    platform: Platform, dataset: str, change: dict[str, Any], status_code: int, message: str
) -> None:
    request = {"project_name": "services", "data": {"dataset": dataset}} | change
    response = platform.http.post("/v1/fine-tune", json=request)
    assert response.status_code == status_code, response.text
    assert message in response.json()["detail"]


def test_an_unknown_base_model_fails_the_job_without_a_retry(platform: Platform, dataset: str) -> None:
    job_id = platform.submit("fine_tune", spec={**SPEC, "base_model": "/no/such/model", "data": {"dataset": dataset}})
    job = platform.wait_for(job_id)
    assert (job["state"], job["attempt"]) == ("failed", 1)
    assert (
        job["error"]["message"]
        == "There is no base model '/no/such/model': /no/such/model is not a folder on this machine."
    )
