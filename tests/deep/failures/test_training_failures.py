"""A training survives the loss of its process, its node and the whole cluster, and a full disk."""

import subprocess
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.runtime import embedded
from cluster.runtime.processes import MARKER_VARIABLE
from cluster.settings import load_settings
from tests.deep.ray_node import kill_node, start_node
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
    nodes = [start_trainer(platform)]

    def kill_the_node(job_id: str) -> None:
        kill_node(nodes.pop())
        if platform.job(job_id)["state"] == "succeeded":
            nodes.append(start_trainer(platform))

    job_id = interrupted_job(platform, kill_the_node, labels={"role": "trainer"})
    eventually(lambda: "role=trainer" in (platform.job(job_id)["waiting_for"] or ""))
    second = start_trainer(platform)
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
    assert set(platform.trained_steps(job_id)) == set(range(1, STEPS + 1))


def start_trainer(platform: Platform) -> subprocess.Popen[bytes]:
    """A second node of the platform's cluster."""
    environment = {
        **embedded.environment(load_settings().settings),
        **platform.environment,
        **platform.ray_environment,
        MARKER_VARIABLE: str(platform.home),
    }
    address = f"127.0.0.1:{platform.environment['FORGEARR_RAY__PORT']}"
    return start_node(address, environment, platform.home / "node.log")
