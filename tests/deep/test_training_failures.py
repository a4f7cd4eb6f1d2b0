"""A training survives the death of its process, of its node, and of the whole cluster; a full disk costs it nothing."""

import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.runtime import embedded
from cluster.runtime.processes import MARKER_VARIABLE
from cluster.settings import load_settings
from tests.support.platform import Platform, running_platform
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
SAME = ("steps", "train_loss", "eval_loss", "trained_tokens")


@pytest.fixture(scope="module")
def platform() -> Generator[Platform]:
    with running_platform({"jobs.lease_seconds": "6", "jobs.max_losses": "9", "mlflow.enabled": "false"}) as platform:
        yield platform


@pytest.fixture(scope="module")
def undisturbed(platform: Platform) -> dict[str, Any]:
    job = platform.wait_for(platform.submit("fine_tune", spec=SPEC))
    assert job["state"] == "succeeded", job["error"]
    return {name: job["result"][name] for name in SAME}


def test_its_process_is_killed(platform: Platform, undisturbed: dict[str, Any]) -> None:
    job_id = struck(platform, lambda _: platform.kill("ray::Worker"))
    assert_as_undisturbed(platform, job_id, undisturbed)


def test_the_power_is_cut(platform: Platform, undisturbed: dict[str, Any]) -> None:
    def cut_the_power(_: str) -> None:
        platform.cut_the_power()
        platform.up()

    job_id = struck(platform, cut_the_power)
    assert_as_undisturbed(platform, job_id, undisturbed)


def test_its_node_dies(platform: Platform, undisturbed: dict[str, Any]) -> None:
    nodes = [another_node(platform)]

    def kill_the_node(job_id: str) -> None:
        kill_all_of(nodes.pop())
        if platform.job(job_id)["state"] == "succeeded":
            nodes.append(another_node(platform))

    job_id = struck(platform, kill_the_node, labels={"role": "trainer"})
    eventually(lambda: "role=trainer" in (platform.job(job_id)["waiting_for"] or ""))
    second = another_node(platform)
    assert_as_undisturbed(platform, job_id, undisturbed)
    kill_all_of(second)


def test_the_disk_is_full_when_it_saves(platform: Platform, undisturbed: dict[str, Any]) -> None:
    """It fails with a sentence; once there is room again, a retry goes on from the checkpoint before."""
    for _ in range(10):
        job_id = struck(platform, lambda job_id: fill_the_disk(platform, job_id), step=4)
        try:
            job = platform.wait_for(job_id)
        finally:
            subprocess.run(["umount", checkpoints(platform, job_id)], check=True)
        if job["state"] != "succeeded":
            break
    else:
        pytest.fail("each of ten jobs had nothing left to save")
    assert job["state"] == "failed"
    assert job["error"]["code"] == "disk_full"
    assert "became full" in job["error"]["message"]
    platform.http.post(f"/api/v1/jobs/{job_id}/retry").raise_for_status()
    assert_as_undisturbed(platform, job_id, undisturbed)


def fill_the_disk(platform: Platform, job_id: str) -> None:
    folder = checkpoints(platform, job_id)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    mounted = subprocess.run(mount, check=False).returncode == 0
    is_over = platform.job(job_id)["state"] == "succeeded"
    if mounted and is_over:
        subprocess.run(["umount", folder], check=True)
    if not mounted and not is_over:
        pytest.skip("only an administrator of the machine can mount a small disk")


def checkpoints(platform: Platform, job_id: str) -> str:
    return str(platform.home / "storage" / "jobs" / job_id / "checkpoints")


def struck(platform: Platform, strike: Callable[[str], object], *, step: int = 8, **more: Any) -> str:
    """A job that was struck in the middle, after this step; where one is over before that, the next one is struck."""
    for _ in range(10):
        job_id = platform.submit("fine_tune", spec={**SPEC, **more})
        reached(platform, job_id, step)
        strike(job_id)
        if platform.job(job_id)["state"] != "succeeded":
            return job_id
    pytest.fail("each of ten jobs was over before it was struck")


def reached(platform: Platform, job_id: str, step: int) -> None:
    def there() -> bool:
        job = platform.job(job_id)
        if job["state"] not in {"queued", "running", "succeeded"}:
            pytest.fail(f"it ended by itself: {job['error']}")
        found = platform.http.get(f"/status/{job_id}").json()
        return (found["current_step"] or 0) >= step

    eventually(there)


def assert_as_undisturbed(platform: Platform, job_id: str, undisturbed: dict[str, Any]) -> None:
    """It ended as if nothing had happened, and no step before a checkpoint was trained again."""
    job = platform.wait_for(job_id)
    assert job["state"] == "succeeded", job["error"]
    assert {name: job["result"][name] for name in SAME} == undisturbed
    saved = 0
    trained: list[int] = []
    for event in events(platform, job_id):
        metrics = event["data"].get("metrics", {})
        if event["type"] == "checkpoint":
            saved = event["data"]["state"].get("place", {}).get("step", 0)
        elif "loss" in metrics:
            assert metrics["step"] > saved
            trained.append(int(metrics["step"]))
    assert set(trained) == set(range(1, STEPS + 1))


def events(platform: Platform, job_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    after: int | None = 0
    while after is not None:
        page = platform.http.get(f"/api/v1/jobs/{job_id}/events", params={"after": after, "limit": 500}).json()
        found += page["items"]
        after = page["next_after"]
    return found


def another_node(platform: Platform) -> subprocess.Popen[bytes]:
    """A second node of the cluster, on this machine: only it carries the label role=trainer."""
    environment = {
        **embedded.environment(load_settings().settings),
        **platform.environment,
        MARKER_VARIABLE: str(platform.home),
    }
    address = f"127.0.0.1:{platform.environment['FORGEARR_RAY__PORT']}"
    command = [sys.executable, "-m", "tests.deep.ray_node", address, "role", "trainer"]
    with Path(platform.home, "node.log").open("ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    return process


def kill_all_of(node: subprocess.Popen[bytes]) -> None:
    """Its raylet, and every process that runs on it."""
    victims = psutil.Process(node.pid).children(recursive=True)
    for victim in victims:
        victim.kill()
    psutil.wait_procs(victims, timeout=10)
    node.kill()
    node.wait()
