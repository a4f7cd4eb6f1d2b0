"""A repository becomes the training data of its own model, which is compared, deployed and asked."""

from pathlib import Path

import openai
import pytest

from tests.support.platform import Platform
from tests.support.sample_repo import FIRST_MODULES, SampleRepo
from tests.support.waiting import eventually

pytestmark = pytest.mark.platform

TRAINING = {"tuning": "full", "max_steps": "1"}  # deep/test_retraining.py trains until the model knows the repository
STEPS = ["extract_data", "validate_data", "fine_tune", "export", "validate", "compare", "deploy"]


def test_a_repository_gets_a_model_of_its_own(platform: Platform, projects: Path, client: openai.OpenAI) -> None:
    repo = SampleRepo(projects / "household")
    repo.commit(FIRST_MODULES)
    options = [word for name, value in TRAINING.items() for word in ("--set", f"training.{name}={value}")]
    platform.cli("repo", "add", str(repo.folder), *options)
    (plan,) = eventually(lambda: platform.http.get("/api/v1/jobs", params={"kind": "retrain"}).json()["items"])
    ended = platform.wait_for(plan["id"])
    assert ended["state"] == "succeeded", ended["error"]
    assert (ended["result"]["promoted"], ended["result"]["commit"]) == (True, repo.git("rev-parse", "HEAD"))
    children = platform.http.get("/api/v1/jobs", params={"parent_id": plan["id"], "limit": 100}).json()["items"]
    assert [child["kind"] for child in sorted(children, key=lambda child: child["created_at"])] == STEPS
    assert platform.http.get("/api/v1/models/household").json()["served_version"] == 1
    answer = client.chat.completions.create(
        model="household", messages=[{"role": "user", "content": "What does `warm_up` do?"}], max_tokens=8
    )
    assert answer.usage
    assert answer.usage.completion_tokens > 0
