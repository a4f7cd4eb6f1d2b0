"""The plan, step by step: which jobs it asks for, with what, and what it makes of their results.

These tests take the workers' part: they run the plan as often as a worker would, and finish its children.
"""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.db import Database, with_own_database
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
    """A link that remembers the children a job asks for, as the queue does."""

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
    """A plan, and what becomes of it."""

    def __init__(self, harness: JobHarness, spec: dict[str, Any]) -> None:
        self.harness, self.spec = harness, spec
        self.job_id, _ = harness.start("retrain", spec, tracked=False)
        self.link = ParentLink()

    def resume(self) -> Any:
        return self.harness.resume("retrain", self.spec, self.job_id, self.link)

    def step(self) -> Job:
        """Run it until it waits for its next child."""
        with pytest.raises(ParkJob) as park:
            self.resume()
        (waited_for,) = park.value.children
        return next(child for child in self.link.children.values() if child.id == waited_for)

    def finish(self, **results: Any) -> Any:
        """Let every step succeed with these results."""
        while True:
            try:
                return self.resume()
            except ParkJob as park:
                (child,) = [one for one in self.link.children.values() if one.id in park.children]
                assert child.state == State.QUEUED, "it waits for the same child once more"
                child.state, child.result = State.SUCCEEDED, {**RESULTS, **results}[child.kind]


@pytest.fixture
def harness(migrated: Path) -> JobHarness:
    return JobHarness(migrated)


@pytest.fixture
def source(harness: JobHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """A repository of one commit, and its id as a registered one."""
    monkeypatch.setenv("FORGEARR_GUARDIAN__ROOTS", f"[{tmp_path}/code]")
    get_settings.cache_clear()
    folder = new_repository(tmp_path / "code" / "handbook")
    commit_files(folder, "Begin", {"a.py": "A = 1\n"})
    request = RepositoryRequest(name="handbook", path=str(folder), training={"max_steps": 7, "rank": 4})

    async def create(database: Database) -> str:
        async with database.transaction() as session:
            return (await register(session, request, LOCAL)).id

    return folder, asyncio.run(with_own_database(create))


def test_the_steps_follow_each_other(harness: JobHarness, source: tuple[Path, str]) -> None:
    folder, repository_id = source
    first = commit_files(folder, "Second", {"b.py": "B = 2\n"})
    run = RetrainRun(harness, {"repository_id": repository_id})
    extraction = run.step()
    assert extraction.spec.items() >= {"repository_id": repository_id, "commit": first}.items()
    tried = row(repository_id)
    assert (tried.tried_commit, tried.tried_job_id, tried.trained_commit) == (first, run.job_id, None)

    # What it set out with, it goes by: neither a later commit nor another training changes this plan.
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
    assert specs["deploy"].items() >= {"name": "handbook", "version": 3, "force": False}.items()

    assert (result["model"], result["version"], result["commit"]) == ("handbook", 3, first)
    assert (result["promoted"], result["deploy"]) == (True, RESULTS["deploy"])
    trained = row(repository_id)
    assert (trained.trained_commit, trained.trained_job_id) == (first, run.job_id)
    assert trained.trained_at is not None
    assert run.link.progress[-1] == 95
    assert run.link.logged[-1] == "Deployed. It is better."


def test_a_worse_one_stays_a_candidate(harness: JobHarness, source: tuple[Path, str]) -> None:
    _, repository_id = source
    run = RetrainRun(harness, {"repository_id": repository_id})
    result = run.finish(compare=WORSE)
    assert "deploy" not in run.link.children
    assert (result["promoted"], result["reason"], result["deploy"]) == (False, "It is worse.", None)
    assert row(repository_id).trained_commit == result["commit"]
    assert run.link.logged[-1] == "Not promoted. It is worse."


@pytest.mark.parametrize(
    ("said", "registered", "deploys"), [(False, True, False), (True, False, True), (None, False, False)]
)
def test_it_is_served_if_that_is_wanted(
    harness: JobHarness, source: tuple[Path, str], said: bool | None, registered: bool, deploys: bool
) -> None:
    _, repository_id = source
    change(repository_id, auto_deploy=registered)
    run = RetrainRun(harness, {"repository_id": repository_id, "auto_deploy": said})
    result = run.finish()
    assert result["promoted"]
    assert ("deploy" in run.link.children, result["deploy"] is not None) == (deploys, deploys)


def test_what_fails_ends_it_and_is_not_taken_for_learned(harness: JobHarness, source: tuple[Path, str]) -> None:
    _, repository_id = source
    run = RetrainRun(harness, {"repository_id": repository_id})
    run.step().state, run.link.children["extract_data"].result = State.SUCCEEDED, EXTRACTED
    examined = run.step()
    examined.state, examined.error = State.FAILED, {"message": "Too little data: there are 3 different samples."}
    with pytest.raises(ChildFailed, match="Too little data: there are 3"):
        run.resume()
    left = row(repository_id)
    assert (left.tried_job_id, left.trained_commit) == (run.job_id, None)


def test_the_same_is_not_learned_twice_unless_it_is_forced(harness: JobHarness, source: tuple[Path, str]) -> None:
    _, repository_id = source
    result = RetrainRun(harness, {"repository_id": repository_id}).finish()
    with pytest.raises(NothingNew, match=result["commit"]):
        RetrainRun(harness, {"repository_id": repository_id}).resume()
    assert RetrainRun(harness, {"repository_id": repository_id, "force": True}).finish()["commit"] == result["commit"]
    with pytest.raises(RepositoryNotFound):
        RetrainRun(harness, {"repository_id": "repo_unknown"}).resume()


def test_feedback_is_learned_beside_the_repository_ever_after(harness: JobHarness, source: tuple[Path, str]) -> None:
    _, repository_id = source
    RetrainRun(harness, {"repository_id": repository_id}).finish()
    say("handbook", 3)
    run = RetrainRun(
        harness, {"repository_id": repository_id, "feedback": "handbook"}
    )  # the commit alone would be nothing new
    run.finish()
    assert list(run.link.children) == ["extract_data", "gather_feedback", *STEPS[1:]]
    assert run.link.children["gather_feedback"].spec == {
        "model": "handbook",
        "train": "ds_train",
        "held_out": "ds_held",
    }
    assert run.link.children["fine_tune"].spec["data"]["dataset"] == "ds_more"
    gathered(harness, {"model": "handbook"})
    later = RetrainRun(harness, {"repository_id": repository_id, "force": True})
    later.finish()
    assert "gather_feedback" in later.link.children


def test_feedback_becomes_data(harness: JobHarness) -> None:
    with pytest.raises(EmptyData, match="no feedback on handbook"):
        gathered(harness, {"model": "handbook"})
    say("handbook", 20)
    say("other", 1)
    made = gathered(harness, {"model": "handbook"})
    assert (made["prompts"], made["new_prompts"]) == (20, 20)
    train, held_out = questions(made["train"]["dataset"]), questions(made["held_out"]["dataset"])
    assert train | held_out == {f"handbook {number}?" for number in range(20)}
    assert not train & held_out
    assert held_out

    # Beside other data, from which nothing is learned that feedback holds out; and no feedback is learned twice.
    hidden = min(held_out)
    beside = keep("beside", [chat(hidden, "Yes."), chat("Why?", "So.")]), keep("held", [chat("When?", "Now.")])
    spec = {"model": "handbook", "train": beside[0], "held_out": beside[1]}
    again = gathered(harness, spec)
    assert (again["prompts"], again["new_prompts"]) == (20, 0)
    assert questions(again["train"]["dataset"]) == train | {"Why?"}
    assert questions(again["held_out"]["dataset"]) == held_out | {"When?"}


def test_a_question_is_on_one_side_for_good() -> None:
    conversations = [chat(f"{number}?", answer) for number in range(50) for answer in ("Yes.", "No.")]
    train, held_out = gather_feedback.split(conversations)
    sides = [{one.messages[0].content for one in side} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert len(train) + len(held_out) == 100
    more = gather_feedback.split([*conversations, *(chat(f"{number} more?", "Yes.") for number in range(50))])
    assert {one.messages[0].content for one in more[1]} >= sides[1]
    assert gather_feedback.split(conversations[:1]) == (conversations[:1], [])
    assert [len(side) for side in gather_feedback.split([chat("a", "b"), chat("c", "d")])] == [1, 1]


async def test_there_is_one_plan_at_a_time(database: Database) -> None:
    async with database.transaction() as session:
        for name in ("one", "two"):
            session.add(
                Repository(
                    id=f"repo_{name}", name=name, path="/srv", model=name, created_by="t", training={}, policy={}
                )
            )
    first, is_new = await asked(database, repository_id="repo_one")
    assert is_new
    assert await asked(database, repository_id="repo_one", force=True) == (first, False)
    assert (await asked(database, repository_id="repo_two"))[1]
    other, is_new = await asked(database, feedback="one")
    assert is_new
    assert await asked(database, feedback="one") == (other, False)
    async with database.transaction() as session:
        (await session.get_one(Job, first)).state = State.CANCELLED
    assert (await asked(database, repository_id="repo_one"))[1]
    with pytest.raises(RepositoryNotFound):
        await asked(database, repository_id="repo_three")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({}, "give a repository_id"),
        ({"feedback": "m", "commit": "0" * 40}, "a commit needs a repository_id"),
        ({"repository_id": "r", "commit": "main"}, "commit"),
    ],
)
def test_what_no_plan_can_be_made_of_is_refused(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RetrainSpec.model_validate(spec)


def gathered(harness: JobHarness, spec: dict[str, Any]) -> Any:
    job_id, link = harness.start("gather_feedback", spec, tracked=False)
    return harness.resume("gather_feedback", spec, job_id, link)


async def asked(database: Database, **spec: Any) -> tuple[str, bool]:
    async with database.transaction() as session:
        job, is_new = await get_or_enqueue(session, RetrainSpec(**spec), LOCAL)
        return job.id, is_new


def row(repository_id: str) -> Repository:
    async def read(database: Database) -> Repository:
        async with database.read_transaction() as session:
            return await session.get_one(Repository, repository_id)

    return asyncio.run(with_own_database(read))


def change(repository_id: str, **columns: Any) -> None:
    async def write(database: Database) -> None:
        async with database.transaction() as session:
            repository = await session.get_one(Repository, repository_id)
            for name, value in columns.items():
                setattr(repository, name, value)

    asyncio.run(with_own_database(write))


def say(model: str, count: int) -> None:
    """So many people find an answer of this model good."""

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

    asyncio.run(with_own_database(write))


def chat(question: str, answer: str) -> Sample:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Sample.model_validate({"messages": messages})


def keep(name: str, samples: list[Sample]) -> str:
    content = data_content.write_samples(samples, folder() / f"{name}.jsonl", name)
    return asyncio.run(
        with_own_database(lambda database: datasets.store_dataset(database, f"repo/{name}", content, {}, LOCAL))
    ).id


def questions(dataset_id: str) -> set[str]:
    loaded = datasets.load(datasets.get(dataset_id))
    return {str(one.messages[0].content) for one in loaded}
