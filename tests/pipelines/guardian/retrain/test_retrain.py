"""The retraining plan: which child jobs it starts, with which specs, and what it does with their results.

The tests act as the workers: they run the plan until it parks, and finish its children.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.db import Database, run_with_database
from cluster.ownership import LOCAL, system
from cluster.settings import get_settings
from cluster.settings import home as folder
from jobs.context import ParkJob
from jobs.leases import Claim
from jobs.queue import ChildFailed
from jobs.registry import Resources, kinds
from jobs.states import State
from jobs.tables import Job
from pipelines.guardian.feedback import gather_feedback
from pipelines.guardian.feedback import store as feedback_store
from pipelines.guardian.feedback.store import FeedbackRequest
from pipelines.guardian.repositories import Repository, RepositoryNotFound, RepositoryRequest
from pipelines.guardian.repositories import create as register
from pipelines.guardian.retrain.job import NothingNew, RetrainSpec, get_or_enqueue
from pipelines.training.data import content as data_content
from pipelines.training.data import datasets
from pipelines.training.data.parsing import EmptyData
from pipelines.training.data.samples import Sample
from tests.support.git_repos import commit_files, new_repository
from tests.support.job_harness import JobHarness
from tests.support.recording_link import RecordingLink

EXTRACTED = {"train": {"dataset": "ds_train", "samples": 30}, "held_out": {"dataset": "ds_held", "samples": 4}}
BETTER = {"promoted": True, "reason": "It is better.", "improvement": 0.3}
WORSE = {"promoted": False, "reason": "It is worse.", "improvement": -0.3}
RESULTS: dict[str, Any] = {
    "extract_data": EXTRACTED,
    "gather_feedback": {"train": {"dataset": "ds_more", "samples": 33}, "held_out": {"dataset": "ds_kept"}},
    "validate_data": {"enough": True},
    "fine_tune": {"name": "handbook"},
    "export": {"name": "handbook", "version": 3},
    "validate": {"passed": True, "reasons": []},
    "compare": BETTER,
    "deploy": {"model_name": "handbook:latest"},
}
STEPS = ["extract_data", "validate_data", "fine_tune", "export", "validate", "compare", "deploy"]


class ParentLink(RecordingLink):
    """A link that stores the children of a job, as the queue does."""

    def __init__(self) -> None:
        super().__init__()
        self.children: dict[str, Job] = {}

    def child(self, claim: Claim, name: str, kind: str, spec: Mapping[str, Any], resources: Resources | None) -> Job:
        if name not in self.children:
            if declared := kinds().get(kind):
                spec = declared.validate_spec(dict(spec))
            job = Job(id=f"job_{name}", kind=kind, child_name=name, state=State.QUEUED, spec=dict(spec))
            job.resources = resources.model_dump() if resources else {}
            self.children[name] = job
        return self.children[name]


class RetrainRun:
    """One run of a retraining plan."""

    def __init__(self, harness: JobHarness, spec: dict[str, Any]) -> None:
        self.harness, self.spec = harness, spec
        self.job_id, _ = harness.start("retrain", spec, tracked=False)
        self.link = ParentLink()

    def resume(self) -> Any:
        return self.harness.resume("retrain", self.spec, self.job_id, self.link)

    def step(self) -> Job:
        """Run until the plan waits for its next child; return that child."""
        with pytest.raises(ParkJob) as park:
            self.resume()
        (waited_for,) = park.value.children
        return next(child for child in self.link.children.values() if child.id == waited_for)

    def finish(self, **results: Any) -> Any:
        """Let every step succeed with these results; return the result of the plan."""
        while True:
            try:
                return self.resume()
            except ParkJob as park:
                (child,) = [candidate for candidate in self.link.children.values() if candidate.id in park.children]
                assert child.state == State.QUEUED, "it waits for the same child again"
                child.state, child.result = State.SUCCEEDED, {**RESULTS, **results}[child.kind]


@pytest.fixture
def harness(migrated: Path) -> JobHarness:
    return JobHarness(migrated)


@pytest.fixture
def source(harness: JobHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """A repository with one commit, and the id under which it is registered."""
    monkeypatch.setenv("FORGEARR_GUARDIAN__ROOTS", f"[{tmp_path}/code]")
    get_settings.cache_clear()
    folder = new_repository(tmp_path / "code" / "handbook")
    commit_files(folder, "Begin", {"a.py": "A = 1\n"})
    request = RepositoryRequest(name="handbook", path=str(folder), training={"max_steps": 7, "rank": 4})

    async def create(database: Database) -> str:
        async with database.transaction() as session:
            return (await register(session, request, LOCAL)).id

    return folder, run_with_database(create)


def test_the_steps_run_in_order(harness: JobHarness, source: tuple[Path, str]) -> None:
    folder, repository_id = source
    first = commit_files(folder, "Second", {"b.py": "B = 2\n"})
    run = RetrainRun(harness, {"repository_id": repository_id})
    extraction = run.step()
    assert extraction.spec.items() >= {"repository_id": repository_id, "commit": first}.items()
    before = row(repository_id)
    assert (before.tried_commit, before.tried_job_id, before.trained_commit) == (first, run.job_id, None)

    # A plan keeps its commit and settings: a later commit or change of the repository does not affect it.
    commit_files(folder, "Third", {"c.py": "C = 3\n"})
    change(repository_id, training={"max_steps": 8})
    assert run.step() is extraction
    result = run.finish()
    assert [child.kind for child in run.link.children.values()] == STEPS
    specs = {child.kind: child.spec for child in run.link.children.values()}
    assert specs["validate_data"].items() >= {"train": "ds_train", "held_out": "ds_held"}.items()
    training = specs["fine_tune"]
    assert (training["name"], training["max_steps"], training["rank"]) == ("handbook", 7, 4)
    assert (training["data"]["dataset"], training["validation"]["dataset"]) == ("ds_train", "ds_held")
    assert training["long_samples"] == "skip"
    assert specs["export"]["job_id"] == "job_fine_tune"
    assert specs["validate"].items() >= {"job_id": "job_fine_tune", "export_job_id": "job_export"}.items()
    assert specs["compare"].items() >= {"name": "handbook", "version": 3, "job_id": "job_fine_tune"}.items()
    assert specs["deploy"].items() >= {"name": "handbook", "version": 3, "gates": {}, "force": False}.items()

    assert (result["model"], result["version"], result["commit"]) == ("handbook", 3, first)
    assert (result["promoted"], result["deploy"]) == (True, RESULTS["deploy"])
    after = row(repository_id)
    assert (after.trained_commit, after.trained_job_id) == (first, run.job_id)
    assert after.trained_at is not None
    assert run.link.progress[-1] == 95
    assert run.link.logged[-1] == "Deployed. It is better."


def test_a_worse_model_is_not_deployed(harness: JobHarness, source: tuple[Path, str]) -> None:
    _, repository_id = source
    run = RetrainRun(harness, {"repository_id": repository_id})
    result = run.finish(compare=WORSE)
    assert "deploy" not in run.link.children
    assert (result["promoted"], result["reason"], result["deploy"]) == (False, "It is worse.", None)
    assert row(repository_id).trained_commit == result["commit"]
    assert run.link.logged[-1] == "Not promoted. It is worse."


@pytest.mark.parametrize(
    ("requested", "registered", "deploys"), [(False, True, False), (True, False, True), (None, False, False)]
)
def test_the_spec_overrides_the_repositorys_auto_deploy(
    harness: JobHarness, source: tuple[Path, str], requested: bool | None, registered: bool, deploys: bool
) -> None:
    _, repository_id = source
    change(repository_id, auto_deploy=registered)
    run = RetrainRun(harness, {"repository_id": repository_id, "auto_deploy": requested})
    result = run.finish()
    assert result["promoted"]
    assert ("deploy" in run.link.children, result["deploy"] is not None) == (deploys, deploys)


def test_a_failed_step_fails_the_plan_and_records_no_training(harness: JobHarness, source: tuple[Path, str]) -> None:
    _, repository_id = source
    run = RetrainRun(harness, {"repository_id": repository_id})
    run.step().state, run.link.children["extract_data"].result = State.SUCCEEDED, EXTRACTED
    validation = run.step()
    validation.state, validation.error = State.FAILED, {"message": "Too little data: there are 3 different samples."}
    with pytest.raises(ChildFailed, match="Too little data: there are 3"):
        run.resume()
    repository = row(repository_id)
    assert (repository.tried_job_id, repository.trained_commit) == (run.job_id, None)


def test_the_same_commit_is_trained_again_only_with_force(harness: JobHarness, source: tuple[Path, str]) -> None:
    _, repository_id = source
    result = RetrainRun(harness, {"repository_id": repository_id}).finish()
    with pytest.raises(NothingNew, match=result["commit"]):
        RetrainRun(harness, {"repository_id": repository_id}).resume()
    assert RetrainRun(harness, {"repository_id": repository_id, "force": True}).finish()["commit"] == result["commit"]
    with pytest.raises(RepositoryNotFound):
        RetrainRun(harness, {"repository_id": "repo_unknown"}).resume()


def test_later_plans_of_a_repository_include_its_feedback(harness: JobHarness, source: tuple[Path, str]) -> None:
    _, repository_id = source
    RetrainRun(harness, {"repository_id": repository_id}).finish()
    give_feedback("handbook", 3)
    # Without the feedback there would be nothing new, because the commit is trained already.
    run = RetrainRun(harness, {"repository_id": repository_id, "feedback": "handbook"})
    run.finish()
    assert list(run.link.children) == ["extract_data", "gather_feedback", *STEPS[1:]]
    assert run.link.children["gather_feedback"].spec == {
        "model": "handbook",
        "train": "ds_train",
        "held_out": "ds_held",
    }
    assert run.link.children["fine_tune"].spec["data"]["dataset"] == "ds_more"
    gather(harness, {"model": "handbook"})
    later = RetrainRun(harness, {"repository_id": repository_id, "force": True})
    later.finish()
    assert "gather_feedback" in later.link.children


def test_feedback_becomes_datasets(harness: JobHarness) -> None:
    with pytest.raises(EmptyData, match="no feedback on handbook"):
        gather(harness, {"model": "handbook"})
    give_feedback("handbook", 20)
    give_feedback("other", 1)
    result = gather(harness, {"model": "handbook"})
    assert (result["prompts"], result["new_prompts"]) == (20, 20)
    train, held_out = questions(result["train"]["dataset"]), questions(result["held_out"]["dataset"])
    assert train | held_out == {f"handbook {number}?" for number in range(20)}
    assert not train & held_out
    assert held_out

    # With other data: a question that feedback holds out is removed from its training split, and no feedback is
    # used twice.
    held_out_question = min(held_out)
    other_data = (
        store_dataset("beside", [chat(held_out_question, "Yes."), chat("Why?", "So.")]),
        store_dataset("held", [chat("When?", "Now.")]),
    )
    spec = {"model": "handbook", "train": other_data[0], "held_out": other_data[1]}
    combined = gather(harness, spec)
    assert (combined["prompts"], combined["new_prompts"]) == (20, 0)
    assert questions(combined["train"]["dataset"]) == train | {"Why?"}
    assert questions(combined["held_out"]["dataset"]) == held_out | {"When?"}


def test_all_answers_to_a_question_stay_on_one_side_of_the_split() -> None:
    conversations = [chat(f"{number}?", answer) for number in range(50) for answer in ("Yes.", "No.")]
    train, held_out = gather_feedback.split(conversations)
    sides = [{sample.messages[0].content for sample in side} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert len(train) + len(held_out) == 100
    larger = gather_feedback.split([*conversations, *(chat(f"{number} more?", "Yes.") for number in range(50))])
    assert {sample.messages[0].content for sample in larger[1]} >= sides[1]
    assert gather_feedback.split(conversations[:1]) == (conversations[:1], [])
    assert [len(side) for side in gather_feedback.split([chat("a", "b"), chat("c", "d")])] == [1, 1]


async def test_there_is_one_active_plan_per_repository(database: Database) -> None:
    async with database.transaction() as session:
        for name in ("one", "two"):
            session.add(
                Repository(
                    id=f"repo_{name}", name=name, path="/srv", model=name, created_by="t", training={}, policy={}
                )
            )
    first, is_new = await start_plan(database, repository_id="repo_one")
    assert is_new
    assert await start_plan(database, repository_id="repo_one", force=True) == (first, False)
    assert (await start_plan(database, repository_id="repo_two"))[1]
    other, is_new = await start_plan(database, feedback="one")
    assert is_new
    assert await start_plan(database, feedback="one") == (other, False)
    async with database.transaction() as session:
        (await session.get_one(Job, first)).state = State.CANCELLED
    assert (await start_plan(database, repository_id="repo_one"))[1]
    with pytest.raises(RepositoryNotFound):
        await start_plan(database, repository_id="repo_three")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "give a repository_id"),
        ({"feedback": "m", "commit": "0" * 40}, "a commit needs a repository_id"),
        ({"repository_id": "r", "commit": "main"}, "commit"),
    ],
)
def test_an_inconsistent_spec_is_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetrainSpec.model_validate(spec)


def gather(harness: JobHarness, spec: dict[str, Any]) -> Any:
    job_id, link = harness.start("gather_feedback", spec, tracked=False)
    return harness.resume("gather_feedback", spec, job_id, link)


async def start_plan(database: Database, **spec: Any) -> tuple[str, bool]:
    async with database.transaction() as session:
        job, is_new = await get_or_enqueue(session, RetrainSpec(**spec), LOCAL)
        return job.id, is_new


def row(repository_id: str) -> Repository:
    async def read(database: Database) -> Repository:
        async with database.read_transaction() as session:
            return await session.get_one(Repository, repository_id)

    return run_with_database(read)


def change(repository_id: str, **columns: Any) -> None:
    async def write(database: Database) -> None:
        async with database.transaction() as session:
            repository = await session.get_one(Repository, repository_id)
            for name, value in columns.items():
                setattr(repository, name, value)

    run_with_database(write)


def give_feedback(model: str, count: int) -> None:
    """Store positive feedback on this many answers of the model."""

    async def write(database: Database) -> None:
        async with database.transaction() as session:
            for number in range(count):
                request = FeedbackRequest.model_validate(
                    {
                        "target": "chat_completion",
                        "target_id": f"{model}-{number}",
                        "rating": "up",
                        "model": f"{model}:v1",
                        "messages": [{"role": "user", "content": f"{model} {number}?"}],
                        "answer": "Yes.",
                    }
                )
                await feedback_store.save(session, request, system("test"))

    run_with_database(write)


def chat(question: str, answer: str) -> Sample:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Sample.model_validate({"messages": messages})


def store_dataset(name: str, samples: list[Sample]) -> str:
    content = data_content.write_samples(samples, folder() / f"{name}.jsonl", name)
    return run_with_database(lambda database: datasets.store_dataset(database, f"repo/{name}", content, {}, LOCAL)).id


def questions(dataset_id: str) -> set[str]:
    loaded = datasets.load(datasets.get(dataset_id))
    return {str(sample.messages[0].content) for sample in loaded}
