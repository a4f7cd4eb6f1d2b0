"""A training survives the loss of its process, its node and the whole cluster, and a full disk."""

import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.runtime import embedded
from cluster.runtime.processes import MARKER_VARIABLE
from cluster.settings import load_settings
from tests.support.platform import Platform, fill_disk, mount_disk, running_platform, unmount_disk
from tests.support.waiting import eventually

pytestmark = [pytest.mark.platform, pytest.mark.deep]

SPEC: dict[str, Any] = {
    "data": {"dataset": "demo/homelab"},
    "epochs": 6,
    "batch_size": 8,
    "learning_rate": 1e-3,
    "dropout": 0.1,
    "checkpoint_steps": 3,
}
STEPS = 36  # six epochs of 43 samples in batches of eight
COMPARED = ("steps", "train_loss", "eval_loss", "trained_tokens")


@pytest.fixture(scope="module")
def platform() -> Generator[Platform]:
    with running_platform({"jobs.lease_seconds": "6", "mlflow.enabled": "false"}) as platform:
        yield platform


@pytest.fixture(scope="module")
def undisturbed_result(platform: Platform) -> dict[str, Any]:
    job = platform.wait_for(platform.submit("fine_tune", spec=SPEC))
    assert job["state"] == "succeeded", job["error"]
    return {name: job["result"][name] for name in COMPARED}


def test_a_training_survives_a_killed_process(platform: Platform, undisturbed_result: dict[str, Any]) -> None:
    job_id = interrupted_job(platform, lambda _: platform.kill("ray::Worker"))
    assert_same_result(platform, job_id, undisturbed_result)


def test_a_training_survives_a_power_cut(platform: Platform, undisturbed_result: dict[str, Any]) -> None:
    def cut_the_power(_: str) -> None:
        platform.cut_the_power()
        platform.up()

    job_id = interrupted_job(platform, cut_the_power)
    assert_same_result(platform, job_id, undisturbed_result)


def test_a_training_survives_a_power_cut_while_it_saves(platform: Platform, undisturbed_result: dict[str, Any]) -> None:
    """It saves all the time. What the cut has interrupted is not used, and deleted."""

    def cut_the_power(_: str) -> None:
        platform.cut_the_power()
        platform.up()

    job_id = interrupted_job(platform, cut_the_power, checkpoint_steps=1)
    assert_same_result(platform, job_id, undisturbed_result)
    stored = platform.home / "storage" / "jobs" / job_id
    assert [path for path in stored.rglob("*") if path.is_file() and "checkpoints" in path.parts] == []
    assert [*stored.rglob("*.part")] == []


def test_a_training_survives_the_loss_of_its_node(platform: Platform, undisturbed_result: dict[str, Any]) -> None:
    nodes = [start_node(platform)]

    def kill_the_node(job_id: str) -> None:
        kill_node(nodes.pop())
        if platform.job(job_id)["state"] == "succeeded":
            nodes.append(start_node(platform))

    job_id = interrupted_job(platform, kill_the_node, labels={"role": "trainer"})
    eventually(lambda: "role=trainer" in (platform.job(job_id)["waiting_for"] or ""))
    second = start_node(platform)
    assert_same_result(platform, job_id, undisturbed_result)
    kill_node(second)


def test_a_training_can_be_retried_after_a_full_disk(platform: Platform, undisturbed_result: dict[str, Any]) -> None:
    """The training fails with a message. When there is space again, a retry resumes from the last checkpoint."""
    with small_disk(platform) as filler:
        for _ in range(10):
            filler.unlink(missing_ok=True)
            job_id = interrupted_job(platform, lambda _: fill_disk(filler), step=4)
            job = platform.wait_for(job_id)
            if job["state"] != "succeeded":
                break
        else:
            pytest.fail("each of ten jobs finished before its next checkpoint")
        filler.unlink()
        assert job["state"] == "failed"
        assert job["error"]["code"] == "disk_full"
        assert "became full" in job["error"]["message"]
        platform.http.post(f"/api/v1/jobs/{job_id}/retry").raise_for_status()
        assert_same_result(platform, job_id, undisturbed_result)


@contextmanager
def small_disk(platform: Platform) -> Generator[Path]:
    """A disk of its own for the files of jobs; yields the path of a file that fills it."""
    folder = platform.home / "storage" / "jobs"
    mount_disk(folder, 64)
    try:
        yield folder / "filler"
    finally:
        unmount_disk(folder)


def interrupted_job(platform: Platform, interrupt: Callable[[str], object], *, step: int = 8, **spec: Any) -> str:
    """Start a training and interrupt it after this step. If it has finished by then, try the next one."""
    for _ in range(10):
        job_id = platform.submit("fine_tune", spec={**SPEC, **spec})
        wait_for_step(platform, job_id, step)
        interrupt(job_id)
        if platform.job(job_id)["state"] != "succeeded":
            return job_id
    pytest.fail("each of ten jobs finished before it was interrupted")


def wait_for_step(platform: Platform, job_id: str, step: int) -> None:
    def is_reached() -> bool:
        job = platform.job(job_id)
        if job["state"] not in {"queued", "running", "succeeded"}:
            pytest.fail(f"it ended by itself: {job['error']}")
        status = platform.http.get(f"/status/{job_id}").json()
        return (status["current_step"] or 0) >= step

    eventually(is_reached)


def assert_same_result(platform: Platform, job_id: str, undisturbed_result: dict[str, Any]) -> None:
    """Check that the result equals an undisturbed one, and that no step before a checkpoint ran again."""
    job = platform.wait_for(job_id)
    assert job["state"] == "succeeded", job["error"]
    assert {name: job["result"][name] for name in COMPARED} == undisturbed_result
    saved = 0
    trained: list[int] = []
    for event in events(platform, job_id):
        metrics = event["data"].get("metrics", {})
        if event["type"] == "checkpoint":
            saved = max(trained, default=0)
        elif "loss" in metrics:
            assert metrics["step"] > saved
            trained.append(int(metrics["step"]))
    assert set(trained) == set(range(1, STEPS + 1))


def events(platform: Platform, job_id: str) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    after: int | None = 0
    while after is not None:
        page = platform.http.get(f"/api/v1/jobs/{job_id}/events", params={"after": after, "limit": 500}).json()
        events += page["items"]
        after = page["next_after"]
    return events


def start_node(platform: Platform) -> subprocess.Popen[bytes]:
    """Start a second node of the cluster on this machine. Only this node has the label role=trainer."""
    environment = {
        **embedded.environment(load_settings().settings),
        **platform.environment,
        **platform.ray_environment,
        MARKER_VARIABLE: str(platform.home),
    }
    address = f"127.0.0.1:{platform.environment['FORGEARR_RAY__PORT']}"
    command = [sys.executable, "-m", "tests.deep.ray_node", address, "role", "trainer"]
    with Path(platform.home, "node.log").open("ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    return process


def kill_node(node: subprocess.Popen[bytes]) -> None:
    """Kill the node's raylet and all processes that run on it."""
    processes = psutil.Process(node.pid).children(recursive=True)
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=10)
    node.kill()
    node.wait()
