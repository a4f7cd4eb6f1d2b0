"""A changed repository retrains its model, with a git hook, and through a crash of the platform."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.platform import Platform, running_platform
from tests.support.sample_repo import FIRST_MODULES, LATER_MODULES, SampleRepo
from tests.support.waiting import eventually

pytestmark = [pytest.mark.platform, pytest.mark.deep]

FILE, FUNCTION = "doors.py", "lock_at_ten"
TRAINING: dict[str, Any] = {
    "tuning": "full",
    "epochs": 40,
    "learning_rate": 0.002,
    "batch_size": 4,
    "max_length": 128,  # enough for functions; commits are longer
    "cpus_per_worker": 2,
}
MINIMAL_TRAINING = {"tuning": "full", "max_steps": 1}
POLICY = {"min_files": len(LATER_MODULES), "min_hours": "null"}
STEPS = ["extract_data", "validate_data", "fine_tune", "export", "validate", "compare", "deploy"]


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> SampleRepo:
    repo = SampleRepo(tmp_path_factory.mktemp("projects") / "household")
    repo.commit(FIRST_MODULES)
    return repo


@pytest.fixture(scope="module")
def platform(repo: SampleRepo) -> Iterator[Platform]:
    settings = {"guardian.roots": f"[{repo.folder.parent}]", "guardian.watch_cron": "0 0 1 1 *"}
    with running_platform(settings) as platform:
        yield platform


def test_a_changed_repository_retrains_its_model(platform: Platform, repo: SampleRepo) -> None:
    settings = {f"training.{key}": value for key, value in MINIMAL_TRAINING.items()}
    settings |= {f"policy.{key}": value for key, value in POLICY.items()}
    options = [argument for key, value in settings.items() for argument in ("--set", f"{key}={value}")]
    platform.cli("repo", "add", str(repo.folder), *options)
    first = wait_for_plan(platform, plans(platform, 1)[0])
    assert first["state"] == "succeeded", first["error"]
    assert (first["result"]["promoted"], served(platform)) == (True, 1)
    expected = LATER_MODULES[FILE][FUNCTION]
    assert expected not in ask(platform)

    platform.http.patch("/api/v1/repos/household", json={"training": TRAINING}).raise_for_status()
    platform.cli("hook", "install", str(repo.folder))
    repo.commit(LATER_MODULES, platform.environment)
    second = plans(platform, 2)[0]
    eventually(lambda: step(platform, second, "fine_tune", "running"))
    platform.cut_the_power()
    platform.up()
    finished = wait_for_plan(platform, second)
    assert finished["state"] == "succeeded", finished["error"]
    assert finished["result"]["promoted"], finished["result"]["reason"]
    assert [child["kind"] for child in children(platform, second)] == STEPS  # each step once
    assert step(platform, second, "extract_data")["attempt"] == 1
    assert finished["result"]["commit"] == repo.git("rev-parse", "HEAD")
    assert served(platform) == 2
    assert expected in ask(platform)

    platform.http.patch("/api/v1/repos/household", json={"training": MINIMAL_TRAINING}).raise_for_status()
    platform.cli("repo", "retrain", "household", "--force")
    third = wait_for_plan(platform, plans(platform, 3)[0])
    assert third["state"] == "succeeded", third["error"]
    assert (third["result"]["promoted"], third["result"]["deploy"]) == (False, None)
    assert (third["result"]["version"], served(platform)) == (3, 2)
    assert expected in ask(platform)


def plans(platform: Platform, count: int) -> list[str]:
    """Wait until there are this many plans, and return their ids, the newest first. More plans are an error."""

    def list_plans() -> list[str] | None:
        jobs = platform.http.get("/api/v1/jobs", params={"kind": "retrain"}).json()["items"]
        return [job["id"] for job in jobs] if len(jobs) >= count else None

    ids = eventually(list_plans)
    assert len(ids) == count
    return ids


def wait_for_plan(platform: Platform, plan: str) -> dict[str, Any]:
    return platform.wait_for(plan)


def children(platform: Platform, plan: str) -> list[dict[str, Any]]:
    jobs = platform.http.get("/api/v1/jobs", params={"parent_id": plan, "limit": 100}).json()["items"]
    return sorted(jobs, key=lambda job: job["created_at"])


def step(platform: Platform, plan: str, kind: str, state: str | None = None) -> Any:
    matching = [job for job in children(platform, plan) if job["kind"] == kind and state in (None, job["state"])]
    return matching[0] if matching else None


def served(platform: Platform) -> int:
    return platform.http.get("/api/v1/models/household").json()["served_version"]


def ask(platform: Platform) -> str:
    request = {
        "model": "household",
        "messages": [{"role": "user", "content": f"What does the function `{FUNCTION}` do?"}],
        "max_tokens": 60,
        "temperature": 0,
    }
    response = platform.http.post("/v1/chat/completions", json=request)
    assert response.is_success, response.text
    return response.json()["choices"][0]["message"]["content"]
