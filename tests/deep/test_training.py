"""Fine-tuning on a whole platform: it learns, reports, pauses, survives a crash, and resumes."""

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
    answer = platform.http.post("/api/v1/datasets", params={"name": "services"}, content="\n".join(lines))
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def status(platform: Platform, job_id: str) -> dict[str, Any]:
    answer = platform.http.get(f"/status/{job_id}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def metrics_of(platform: Platform, job_id: str) -> dict[int, float]:
    """The loss at each step, as the journal has it; a step that was told twice counts as a fault."""
    losses: dict[int, float] = {}
    after: int | None = 0
    while after is not None:
        page = platform.http.get(f"/api/v1/jobs/{job_id}/events", params={"after": after, "limit": 500}).json()
        for event in page["items"]:
            values = event["data"].get("metrics", {})
            if event["type"] == "progress" and "loss" in values:
                assert int(values["step"]) not in losses, f"step {values['step']} was trained twice"
                losses[int(values["step"])] = values["loss"]
        after = page["next_after"]
    return losses


def test_a_fine_tune_learns_and_everybody_can_watch(platform: Platform, dataset: str) -> None:
    wanted = {
        "project_name": "services",
        "base_model": "forgearr/tiny",
        "epochs": 4,
        "learning_rate": 0.002,
        "rank": 8,
        "use_pissa": True,
        "batch_size": 4,
        "data": {"dataset": dataset},
    }
    answer = platform.http.post("/v1/fine-tune", json=wanted)
    assert answer.status_code == 200, answer.text
    assert answer.json()["status"] == "queued"
    job_id = answer.json()["job_id"]

    with connect(f"ws{platform.url.removeprefix('http')}/ws/training/{job_id}", **WEBSOCKET_OPTIONS) as socket:
        told = [json.loads(socket.recv(timeout=TIMEOUT))]
        while told[-1]["status"] not in {"completed", "failed"}:
            told.append(json.loads(socket.recv(timeout=TIMEOUT)))
    assert told[-1]["status"] == "completed", told[-1]
    assert {one["status"] for one in told} <= {"queued", "preparing", "training", "completed"}
    assert [one["progress"] for one in told] == sorted(one["progress"] for one in told)

    found = status(platform, job_id)
    assert (found["status"], found["progress"], found["current_epoch"], found["total_epochs"]) == (
        "completed",
        100,
        4,
        4,
    )
    assert found["current_step"] == 24
    losses = metrics_of(platform, job_id)
    assert list(losses) == list(range(1, 25))
    assert found["loss"] == pytest.approx(losses[24])
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
    assert not (Path(result["model"]).parent / "checkpoints").exists()  # nobody needs them any more


def test_mlflow_gets_the_whole_run(platform: Platform, dataset: str) -> None:
    job_id = platform.submit("fine_tune", spec={**SPEC, "data": {"dataset": dataset}})
    platform.wait_for(job_id, "succeeded", "failed")
    run_id = eventually(lambda: platform.job(job_id)["mlflow_run_id"])

    def finished() -> dict[str, Any] | None:
        run = platform.http.get(f"{platform.mlflow_url}/api/2.0/mlflow/runs/get", params={"run_id": run_id}).json()[
            "run"
        ]
        return run if run["info"]["status"] == "FINISHED" else None

    run = eventually(finished)
    parameters = {one["key"]: one["value"] for one in run["data"]["params"]}
    assert (parameters["learning_rate"], parameters["data.dataset"]) == ("0.002", dataset)
    assert {"loss", "learning_rate", "grad_norm", "eval_loss", "tokens_per_second"} <= {
        one["key"] for one in run["data"]["metrics"]
    }
    (used,) = run["inputs"]["dataset_inputs"]
    assert used["dataset"]["name"] == "services"
    files = platform.http.get(f"{platform.mlflow_url}/api/2.0/mlflow/artifacts/list", params={"run_id": run_id}).json()
    assert {"loss.png", "adapter_model.safetensors", "environment.json", "result.json"} <= {
        one["path"] for one in files["files"]
    }


def test_several_workers_train_together(platform: Platform, dataset: str) -> None:
    job_id = platform.submit("fine_tune", spec={**SPEC, "workers": 2, "data": {"dataset": dataset}})
    job = platform.wait_for(job_id)
    assert job["state"] == "succeeded", job["error"]
    assert job["result"]["steps"] == 12  # each of them takes half of every step's samples
    assert list(metrics_of(platform, job_id)) == list(range(1, 13))


def test_a_pause_keeps_the_place_and_a_kill_loses_nothing_that_was_saved(platform: Platform, dataset: str) -> None:
    spec = {**LONG, "data": {"dataset": dataset}}
    job_id = platform.submit("fine_tune", spec=spec)
    eventually(lambda: status(platform, job_id)["current_step"])
    platform.http.post(f"/api/v1/jobs/{job_id}/pause").raise_for_status()
    platform.wait_for(job_id, "paused")
    paused_at = status(platform, job_id)
    assert paused_at["status"] == "paused"
    assert paused_at["current_step"] < 24_000
    platform.http.post(f"/api/v1/jobs/{job_id}/resume").raise_for_status()

    def beyond() -> int | None:
        step = status(platform, job_id)["current_step"]
        return step if step > paused_at["current_step"] + 50 else None

    eventually(beyond)
    platform.kill("ray::Worker")  # the light ones too
    platform.wait_for(job_id, "running")
    eventually(lambda: status(platform, job_id)["current_step"] > paused_at["current_step"] + 100)
    platform.http.post(f"/api/v1/jobs/{job_id}/cancel").raise_for_status()
    job = platform.wait_for(job_id)
    assert (job["state"], job["attempt"]) == ("cancelled", 1)
    assert status(platform, job_id)["status"] == "cancelled"


def test_a_session_is_set_up_started_watched_and_cancelled(platform: Platform) -> None:
    http = platform.http
    prompts = [
        http.post(
            "/api/training/prompts",
            json={"name": f"Prompt {number}", "user_input": f"Number {number}?", "expected_output": "Plex."},
        ).json()["id"]
        for number in range(10)
    ]
    wanted = {
        "name": "Custom Assistant v1",
        "description": "Homelab-specific training",
        "base_model": "forgearr/tiny",
        "config": {"num_epochs": 10_000, "learning_rate": 2e-4, "batch_size": 4},
    }
    made = http.post("/api/training/sessions", json=wanted)
    assert made.status_code == 201, made.text
    session = made.json()["id"]
    assert http.get(f"/api/training/sessions/{session}/status").json()["status"] is None
    (worker,) = http.get("/api/training/workers").json()
    assert (worker["id"], worker["status"], worker["gpus"]) == (1, "online", 0)

    nothing = http.post(f"/api/training/sessions/{session}/start", json={"worker_id": 1})
    assert nothing.status_code == 400
    unknown = http.post(f"/api/training/sessions/{session}/start", json={"worker_id": 77, "prompt_ids": prompts})
    assert unknown.status_code == 404

    with connect(f"ws{platform.url.removeprefix('http')}/ws/training/{session}", **WEBSOCKET_OPTIONS) as socket:
        assert json.loads(socket.recv(timeout=TIMEOUT))["status"] is None
        started = http.post(f"/api/training/sessions/{session}/start", json={"worker_id": 1, "prompt_ids": prompts})
        assert started.status_code == 200, started.text
        while (told := json.loads(socket.recv(timeout=TIMEOUT)))["status"] != "training":
            assert told["status"] in {"queued", "preparing"}, told
    assert platform.job(started.json()["job_id"])["spec"]["labels"].keys() == {"forgearr.io/node"}

    again = http.post(f"/api/training/sessions/{session}/start", json={"prompt_ids": prompts})
    assert again.status_code == 409
    assert http.put(f"/api/training/sessions/{session}", json=wanted).status_code == 409
    assert http.delete(f"/api/training/sessions/{session}").status_code == 409
    http.post(f"/api/training/sessions/{session}/cancel").raise_for_status()
    cancelled = lambda: http.get(f"/api/training/sessions/{session}/status").json()["status"] == "cancelled" or None  # noqa: E731
    eventually(cancelled)
    assert http.delete(f"/api/training/sessions/{session}").status_code == 204
    assert http.get(f"/api/training/sessions/{session}").status_code == 404


@pytest.mark.parametrize(
    ("change", "status_code", "sentence"),
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
def test_what_cannot_be_trained_is_refused_at_the_door(
    platform: Platform, dataset: str, change: dict[str, Any], status_code: int, sentence: str
) -> None:
    wanted = {"project_name": "services", "data": {"dataset": dataset}} | change
    answer = platform.http.post("/v1/fine-tune", json=wanted)
    assert answer.status_code == status_code, answer.text
    assert sentence in answer.json()["detail"]


def test_a_base_model_that_does_not_exist_fails_at_once_and_says_so(platform: Platform, dataset: str) -> None:
    job_id = platform.submit("fine_tune", spec={**SPEC, "base_model": "/no/such/model", "data": {"dataset": dataset}})
    job = platform.wait_for(job_id)
    assert (job["state"], job["attempt"]) == ("failed", 1)
    assert (
        job["error"]["message"]
        == "There is no base model '/no/such/model': /no/such/model is not a folder on this machine."
    )
