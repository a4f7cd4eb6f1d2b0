"""A repository becomes training data for a model, which is compared, deployed and queried."""

from pathlib import Path

import openai
import pytest

from tests.support.platform import Platform
from tests.support.sample_repo import FIRST_MODULES, SampleRepo
from tests.support.waiting import eventually

pytestmark = pytest.mark.platform

TRAINING = {"tuning": "full", "max_steps": "1"}  # deep/test_retraining.py trains until the model knows the repository
STEPS = ["extract_data", "validate_data", "fine_tune", "export", "validate", "compare", "deploy"]


def test_a_repository_is_retrained_into_a_served_model(
    platform: Platform, projects: Path, client: openai.OpenAI
) -> None:
    repo = SampleRepo(projects / "household")
    repo.commit(FIRST_MODULES)
    options = [argument for name, value in TRAINING.items() for argument in ("--set", f"training.{name}={value}")]
    platform.cli("repo", "add", str(repo.folder), *options)
    (plan,) = eventually(lambda: platform.http.get("/api/v1/jobs", params={"kind": "retrain"}).json()["items"])
    finished = platform.wait_for(plan["id"])
    assert finished["state"] == "succeeded", finished["error"]
    assert (finished["result"]["promoted"], finished["result"]["commit"]) == (True, repo.git("rev-parse", "HEAD"))
    children = platform.http.get("/api/v1/jobs", params={"parent_id": plan["id"], "limit": 100}).json()["items"]
    assert [child["kind"] for child in sorted(children, key=lambda child: child["created_at"])] == STEPS
    assert platform.http.get("/api/v1/models/household").json()["served_version"] == 1
    completion = client.chat.completions.create(
        model="household", messages=[{"role": "user", "content": "What does `warm_up` do?"}], max_tokens=8
    )
    assert completion.usage
    assert completion.usage.completion_tokens > 0
