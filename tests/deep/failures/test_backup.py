"""A backup of a platform that trains, restored on an empty machine: the training goes on there."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.support.platform import Platform, running_platform
from tests.support.waiting import eventually

pytestmark = [pytest.mark.platform, pytest.mark.deep]

SETTINGS = {"jobs.lease_seconds": "6", "backup.passphrase": "correct horse battery"}
SPEC: dict[str, Any] = {
    "data": {"dataset": "demo/homelab"},
    "epochs": 25,
    "batch_size": 8,
    "learning_rate": 1e-3,
    "checkpoint_steps": 1,
}
CONTENT = b'{"prompt": "a", "completion": "b"}\n' * 100


@pytest.fixture
def platform() -> Generator[Platform]:
    with running_platform(SETTINGS) as platform:
        yield platform


def test_a_training_goes_on_from_a_backup(platform: Platform, tmp_path: Path) -> None:
    upload = platform.http.post("/v1/files", files={"file": ("a.jsonl", CONTENT)}, data={"purpose": "user_data"})
    file_id = upload.raise_for_status().json()["id"]
    platform.wait_for_mlflow()
    earlier = platform.submit("fine_tune", spec={**SPEC, "epochs": 1})
    assert platform.wait_for(earlier)["state"] == "succeeded"
    job_id = platform.submit("fine_tune", spec=SPEC)
    eventually(lambda: step_of(platform, job_id) >= 8)
    output = platform.cli("backup", str(tmp_path / "backup.tar")).stdout
    assert "encrypted" in output
    step = step_of(platform, job_id)
    assert platform.job(job_id)["state"] == "running"
    platform.cut_the_power()

    def restore(empty: Platform) -> None:
        assert "Restored." in empty.cli("restore", str(tmp_path / "backup.tar")).stdout

    with running_platform(SETTINGS, before_up=restore) as restored:
        assert restored.home != platform.home
        job = restored.wait_for(job_id)
        assert job["state"] == "succeeded", job["error"]
        trained = restored.trained_steps(job_id)
        assert trained[0] == 1
        assert trained[-1] == job["result"]["steps"] > step
        assert restored.http.get(f"/v1/files/{file_id}/content").content == CONTENT
        model = Path(restored.job(earlier)["result"]["model"])
        assert model.is_relative_to(restored.home)
        assert (model / "config.json").exists() or (model / "adapter_config.json").exists()
        restored.wait_for_mlflow()
        entries = restored.http.get("/api/v1/audit-log", params={"action": "settings.apply"}).json()["data"]
        assert len(entries) == 2  # the log of the first one goes on


def step_of(platform: Platform, job_id: str) -> int:
    return platform.http.get(f"/status/{job_id}").raise_for_status().json()["current_step"] or 0
