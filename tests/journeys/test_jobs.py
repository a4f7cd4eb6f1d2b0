"""Jobs on a whole platform, through HTTP, server-sent events, WebSockets and the command line."""

import asyncio
import json
import os
import sys
from collections.abc import Generator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosedError

from tests.support.platform import Platform
from tests.support.waiting import TIMEOUT, WEBSOCKET_OPTIONS, eventually

pytestmark = pytest.mark.platform


def test_a_probe_returns_its_payload_and_its_steps(platform: Platform) -> None:
    job = platform.wait_for(platform.submit(spec={"payload": ["x"], "steps": 3, "memory_mb": 8}))
    assert job["state"] == "succeeded"
    assert job["result"] == {"payload": ["x"], "executed": [0, 1, 2]}
    assert job["progress"] == 100
    assert job["created_at"].endswith("Z")


def test_a_failing_probe_is_retried_from_its_checkpoint(platform: Platform) -> None:
    job = platform.wait_for(platform.submit(spec={"steps": 4, "fail_times": 2}))
    assert (job["state"], job["attempt"]) == ("succeeded", 3)
    assert job["result"]["executed"] == [0, 1, 2, 3]
    exhausted = platform.wait_for(platform.submit(spec={"fail_times": 9}, max_attempts=2))
    assert (exhausted["state"], exhausted["attempt"], exhausted["error"]["code"]) == ("failed", 2, "probe_failed")
    retried = platform.http.post(f"/api/v1/jobs/{exhausted['id']}/retry")
    assert retried.json()["state"] == "queued"
    assert platform.wait_for(exhausted["id"])["state"] == "failed"


def test_a_running_job_is_paused_at_its_checkpoint_and_resumed(platform: Platform) -> None:
    for _ in range(10):
        job_id = platform.submit(spec={"steps": 40, "seconds": 8})
        eventually(lambda job_id=job_id: platform.job(job_id)["progress"] > 5)
        platform.http.post(f"/api/v1/jobs/{job_id}/pause")
        paused = platform.wait_for(job_id, "paused", "succeeded")
        if paused["state"] == "paused" and paused["progress"] < 100:
            break
    else:
        pytest.fail("each of ten jobs finished before it was paused")
    assert paused["progress"] > 5
    platform.http.post(f"/api/v1/jobs/{job_id}/resume")
    assert platform.wait_for(job_id)["result"]["executed"] == list(range(40))


def test_a_running_job_is_cancelled(platform: Platform) -> None:
    job_id = platform.submit(spec={"steps": 3, "seconds": 36_000})
    platform.wait_for(job_id, "running")
    platform.http.post(f"/api/v1/jobs/{job_id}/cancel")
    assert platform.wait_for(job_id)["state"] == "cancelled"


@pytest.mark.deep
def test_jobs_have_a_lower_priority_than_engines(platform: Platform) -> None:
    job_id = platform.submit(spec={"steps": 100, "seconds": 36_000})
    platform.wait_for(job_id, "running")
    assert nice_values(platform, "ray::ServeReplica") == {0}
    assert nice_values(platform, "ray::Worker") == {0, 10}
    platform.http.post(f"/api/v1/jobs/{job_id}/cancel")
    platform.wait_for(job_id, "cancelled")


def nice_values(platform: Platform, title: str) -> set[int]:
    """The nice values of all threads of these processes."""
    values: set[int] = set()
    for process in platform.processes(title):
        for thread in process.threads():
            with suppress(ProcessLookupError):  # the thread has ended meanwhile
                values.add(os.getpriority(os.PRIO_PROCESS, thread.id))
    return values


def test_a_job_that_ignores_a_cancel_is_cancelled_by_force(platform: Platform) -> None:
    job_id = platform.submit("deaf", spec={"seconds": 3600})
    platform.wait_for(job_id, "running")
    platform.http.post(f"/api/v1/jobs/{job_id}/cancel")
    assert platform.wait_for(job_id)["state"] == "cancelled"
    # Its worker is replaced, so the pool has all its slots again.
    later = [platform.submit(spec={"seconds": 0.1}) for _ in range(4)]
    assert {platform.wait_for(job_id)["state"] for job_id in later} == {"succeeded"}


@pytest.mark.parametrize(("kind", "code"), [("hurried", "time_limit"), ("silent", "stalled")])
def test_a_job_beyond_its_limits_fails(platform: Platform, kind: str, code: str) -> None:
    job = platform.wait_for(platform.submit(kind))
    assert (job["state"], job["error"]["code"]) == ("failed", code)


@pytest.mark.parametrize("kind", ["broken", "unstorable"])
def test_an_error_in_a_jobs_own_code_is_not_retried(platform: Platform, kind: str) -> None:
    job = platform.wait_for(platform.submit(kind))
    assert (job["state"], job["attempt"], job["error"]["code"]) == ("failed", 1, "job_error")


def test_a_job_that_kills_its_worker_does_not_fail_other_jobs(platform: Platform) -> None:
    others = [platform.submit(spec={"steps": 20, "seconds": 4}) for _ in range(6)]
    job = platform.wait_for(platform.submit("deadly", priority=9))
    assert (job["state"], job["error"]["code"]) == ("failed", "worker_lost")
    for job_id in others:
        assert platform.wait_for(job_id)["result"]["executed"] == list(range(20))


def test_values_that_databases_reject_are_replaced(platform: Platform) -> None:
    job = platform.wait_for(platform.submit("odd"))
    assert job["result"] == {"nul": "a\ufffdb", "nan": None, "infinity": None}


def test_a_parent_collects_its_children_and_fails_with_them(platform: Platform) -> None:
    parent = platform.wait_for(platform.submit("family", spec={"children": 3}))
    assert parent["result"] == [0, 1, 2]
    children = platform.http.get("/api/v1/jobs", params={"parent_id": parent["id"]}).json()
    assert children["total"] == 3
    failed = platform.wait_for(platform.submit("family", spec={"children": 1, "fail": True}))
    assert (failed["state"], failed["error"]["code"]) == ("failed", "child_failed")
    assert "'black sheep'" in failed["error"]["message"]


def test_each_heavy_job_has_its_own_process(platform: Platform) -> None:
    jobs = [platform.submit("heavy", spec={"seconds": 1}) for _ in range(4)]
    impossible = platform.submit("heavy", resources={"gpus": 64})
    results = [platform.wait_for(job_id)["result"] for job_id in jobs]
    assert len(set(results)) == 4
    eventually(lambda: platform.job(impossible)["waiting_for"].startswith("64 GPU"))
    platform.http.post(f"/api/v1/jobs/{impossible}/cancel")
    # The processes of the heavy jobs end with them.
    eventually(lambda: len(platform.processes("ray::Worker")) == 2)


@pytest.mark.deep
def test_a_delayed_job_starts_at_its_time(platform: Platform) -> None:
    start = datetime.now(UTC) + timedelta(seconds=1.5)
    job = platform.wait_for(platform.submit(run_after=start.isoformat()))
    assert datetime.fromisoformat(job["started_at"]) >= start


@pytest.mark.deep
def test_a_schedule_fires_in_its_time_zone(platform: Platform) -> None:
    request = {"name": "each minute", "kind": "probe", "cron": "* * * * *", "timezone": "Asia/Kathmandu"}
    schedule = platform.http.post("/api/v1/schedules", json=request).json()
    job_id = eventually(lambda: platform.http.get(f"/api/v1/schedules/{schedule['id']}").json()["last_job_id"])
    assert platform.wait_for(job_id)["created_by"] == "schedule:each minute"
    assert platform.http.delete(f"/api/v1/schedules/{schedule['id']}").status_code == 204
    assert platform.job(job_id)["state"] == "succeeded"


def test_a_stream_of_events_resumes_after_the_last_event(platform: Platform) -> None:
    job_id = platform.submit(spec={"steps": 10, "seconds": 1.5})
    first: list[tuple[str, str]] = []
    with platform.http.stream("GET", f"/api/v1/jobs/{job_id}/events", params={"follow": 1}) as stream:
        for event in _parse_events(stream):
            first.append(event)
            if event[1] == "checkpoint":
                break
    headers = {"Last-Event-ID": first[-1][0]}
    with platform.http.stream("GET", f"/api/v1/jobs/{job_id}/events", params={"follow": 1}, headers=headers) as stream:
        rest = list(_parse_events(stream))
    page = platform.http.get(f"/api/v1/jobs/{job_id}/events", params={"limit": 500}).json()["items"]
    assert [(str(event["id"]), event["type"]) for event in page] == first + rest
    assert rest[-1][1] == "succeeded"
    checkpoints = [event["data"] for event in page if event["type"] == "checkpoint"]
    assert len(checkpoints) == 10
    assert all(data == {"checkpoint": True, "bytes": data["bytes"]} for data in checkpoints)
    finished = platform.http.get(
        f"/api/v1/jobs/{job_id}/events", params={"follow": 1}, headers={"Last-Event-ID": rest[-1][0]}
    )
    assert finished.status_code == 204


def test_the_log_of_a_job_has_its_own_and_its_libraries_messages(platform: Platform) -> None:
    job_id = platform.submit("talkative")
    platform.wait_for(job_id)
    lines = platform.http.get(f"/api/v1/jobs/{job_id}/logs").json()["items"]
    assert [(line["level"], line["message"]) for line in lines] == [
        ("INFO", "through the context"),
        ("WARNING", "through logging"),
    ]
    assert "through the context" in platform.cli("jobs", "logs", "-f", job_id).stdout


async def test_job_events_appear_in_rooms(platform: Platform) -> None:
    address = platform.url.replace("http", "ws")
    async with (
        connect(f"{address}/ws/me", **WEBSOCKET_OPTIONS) as all_jobs,
        connect(f"{address}/ws/me", **WEBSOCKET_OPTIONS) as one_job,
    ):
        await all_jobs.send(json.dumps({"type": "join_room", "room": "jobs"}))
        assert json.loads(await all_jobs.recv())["room"] == "jobs"
        job_id = await asyncio.to_thread(platform.submit, spec={"steps": 5, "seconds": 36_000})
        await one_job.send(json.dumps({"type": "join_room", "room": f"job:{job_id}"}))
        assert json.loads(await one_job.recv())["type"] == "room_joined"
        await asyncio.to_thread(platform.http.post, f"/api/v1/jobs/{job_id}/cancel")
        for socket in (all_jobs, one_job):
            message: dict[str, Any] = {}
            async with asyncio.timeout(TIMEOUT):
                while message.get("type") != "job.cancelled":
                    message = json.loads(await socket.recv())
                    if message["type"].startswith("job.") and socket is one_job:
                        assert message["data"]["job_id"] == job_id


async def test_a_long_message_of_a_websocket_is_refused_while_it_arrives(platform: Platform) -> None:
    async with connect(f"{platform.url.replace('http', 'ws')}/ws/me", **WEBSOCKET_OPTIONS) as socket:
        await socket.send("x" * 1_000_000)
        with pytest.raises(ConnectionClosedError) as closed:
            async with asyncio.timeout(TIMEOUT):
                await socket.recv()
    assert closed.value.rcvd
    assert closed.value.rcvd.code == 1009
    assert "A message may have" not in closed.value.rcvd.reason  # so says the hub, which gets none that is so long


def test_the_jobs_of_a_disabled_account_end(platform: Platform) -> None:
    platform.add_user("eve@example.com")
    key = platform.cli("key", "create", "laptop", "--user", "eve@example.com").stdout.strip()
    request = {"kind": "probe", "spec": {"steps": 5, "seconds": 60}}
    response = platform.http.post("/api/v1/jobs", json=request, headers={"X-API-Key": key})
    assert response.status_code == 201, response.text
    job_id = response.json()["id"]
    platform.wait_for(job_id, "running")
    platform.cli("user", "disable", "eve@example.com")
    platform.wait_for(job_id, "cancelled")


@pytest.mark.deep
def test_a_tracked_job_becomes_a_run_in_mlflow_also_after_an_outage(platform: Platform) -> None:
    # MLflow takes a while to start. The job does not wait for it.
    platform.wait_for_mlflow()
    mlflow = platform.processes(mentions="mlflow")
    assert mlflow
    for process in mlflow:
        process.suspend()
    job = platform.wait_for(platform.submit("measured", spec={"seconds": 0.5}))
    assert (job["state"], job["mlflow_run_id"]) == ("succeeded", None)
    for process in mlflow:
        process.resume()
    run_id = eventually(lambda: platform.job(job["id"])["mlflow_run_id"])

    def finished() -> dict[str, Any] | None:
        run = platform.http.get(f"{platform.mlflow_url}/api/2.0/mlflow/runs/get", params={"run_id": run_id}).json()[
            "run"
        ]
        return run if run["info"]["status"] == "FINISHED" else None

    run = eventually(finished)
    assert {"key": "seconds", "value": "0.5"} in run["data"]["params"]
    assert {metric["key"]: metric["value"] for metric in run["data"]["metrics"]}["loss"] == pytest.approx(0.2)
    (data,) = (entry["dataset"] for entry in run["inputs"]["dataset_inputs"])
    assert (data["name"], data["source"]) == ("homelab", "storage/homelab.jsonl")
    assert json.loads(data["profile"]) == {"samples": 41}
    tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
    assert tags["forgearr.job_id"] == job["id"]
    assert job["id"] in tags["mlflow.note.content"]
    files = platform.http.get(f"{platform.mlflow_url}/api/2.0/mlflow/artifacts/list", params={"run_id": run_id}).json()[
        "files"
    ]
    assert {file["path"] for file in files} == {"report.md", "result.json"}


def test_jobs_submit_waits_and_its_exit_code_reports_failures(platform: Platform, tmp_path: Path) -> None:
    config = tmp_path / "probe.yaml"
    config.write_text("steps: 4\npayload: {deep: true}\n")
    process = platform.cli("jobs", "submit", "probe", "--config", str(config), "--set", "seconds=0.4", "--wait")
    assert '"deep": true' in process.stdout
    assert "1 of 1 succeeded." in process.stdout
    failed = platform.cli("jobs", "submit", "broken", "--wait", check=False)
    assert failed.returncode == 1
    assert "KeyError" in failed.stdout
    invalid = platform.cli("jobs", "submit", "probe", "--set", "steps=-3", check=False)
    assert (invalid.returncode, invalid.stdout) == (1, "")
    assert "steps" in invalid.stderr
    assert "Traceback" not in invalid.stderr


def test_python_m_jobs_submits_to_the_same_queue(platform: Platform) -> None:
    process = platform.run([sys.executable, "-m", "jobs", "submit", "probe", "--set", "steps=2", "--wait"])
    job_id = process.stdout.splitlines()[0]
    assert platform.job(job_id)["state"] == "succeeded"
    failed = platform.run([sys.executable, "-m", "jobs", "submit", "broken", "--wait"], check=False)
    assert failed.returncode == 1


@pytest.mark.deep
def test_ray_job_submit_reaches_the_same_queue(platform: Platform, tmp_path: Path) -> None:
    config = tmp_path / "probe.yaml"
    config.write_text("steps: 2\n")
    submit = ["python", "-m", "jobs", "submit"]
    process = platform.submit_to_ray(*submit, "probe", "--config", str(config), "--wait")
    assert "succeeded" in process.stdout
    failed = platform.submit_to_ray(*submit, "broken", "--wait", check=False)
    assert failed.returncode != 0
    assert "KeyError" in failed.stdout + failed.stderr


def test_metrics_describe_the_queue(platform: Platform) -> None:
    text = platform.http.get("/metrics").text
    assert 'jobs{kind="probe",state="succeeded"}' in text
    assert "job_queue_depth 0.0" in text
    assert 'api_requests_total{method="POST",path="/api/v1/jobs",status="201"}' in text


def _parse_events(stream: httpx.Response) -> Generator[tuple[str, str]]:
    fields: dict[str, str] = {}
    for line in stream.iter_lines():
        if line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value
        elif fields:
            yield fields["id"], fields["event"]
            fields = {}
