"""The kind `retrain`: train a model from a repository or feedback, compare it with the served one, deploy it if better.

Its steps are child jobs. This job, called the plan, parks meanwhile. When it is called again, it finds the results of
the finished steps.
"""

import asyncio
from dataclasses import dataclass
from typing import Any, Self, TypedDict, cast

from pydantic import Field, model_validator
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import Database, advisory_lock, now, run_with_database
from cluster.errors import UnprocessableRequest
from cluster.ownership import Principal, system
from cluster.settings import get_settings
from jobs import queue
from jobs.context import Context
from jobs.queue import JobRequest
from jobs.registry import job
from jobs.states import FINISHED
from jobs.tables import Job
from pipelines.guardian import repositories
from pipelines.guardian.feedback import store as feedback_store
from pipelines.guardian.repositories import RETRAIN_KIND, Repository, RepositoryNotFound
from pipelines.guardian.retrain.compare import CompareSpec
from pipelines.training.forge import build_candidate, deploy_version, resources_of
from pipelines.training.models import registry
from pipelines.training.models.versions import REFERENCE_PATTERN, Version
from pipelines.training.spec import DataSource, ForgeSpec, ModelName, Spec

KIND = RETRAIN_KIND
STEP_PROGRESS = {
    "extract_data": 0,
    "gather_feedback": 12,
    "validate_data": 15,
    "fine_tune": 20,
    "export": 65,
    "validate": 75,
    "compare": 85,
    "deploy": 95,
}
"""The progress of the plan at the beginning of each step, in percent, in the order of the steps."""


class RetrainSpec(Spec):
    """Retrain the model of a repository, a model with feedback, or both."""

    repository_id: str | None = Field(default=None, max_length=40)
    feedback: ModelName | None = Field(default=None, description="Train on the feedback on this model too.")
    commit: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$", description="Null: the newest of its branch.")
    force: bool = Field(default=False, description="Retrain even if nothing is new since the last training.")
    auto_deploy: bool | None = Field(default=None, description="Deploy a better model. Null: the repository's setting.")

    @model_validator(mode="after")
    def validate_target(self) -> Self:
        if self.repository_id is None and self.feedback is None:
            raise ValueError("give a repository_id, or the name of a model that has feedback")
        if self.repository_id is None and self.commit is not None:
            raise ValueError("a commit needs a repository_id")
        return self


class NothingNew(UnprocessableRequest):
    """Nothing is new since the last training."""

    code = "NOTHING_NEW"


class RetrainState(TypedDict):
    """The input of the plan, fixed in its first checkpoint. Later changes of the repository do not affect it."""

    model: str
    commit: str | None
    training: dict[str, Any]
    feedback: bool
    auto_deploy: bool


@dataclass(frozen=True)
class _Source:
    """What the database says about the source of the model."""

    repository: Repository | None
    has_learned: bool
    new_feedback: int


@job(RETRAIN_KIND, spec=RetrainSpec, admin_only=True, tracked=True)
def retrain(context: Context, spec: RetrainSpec) -> dict[str, Any]:
    """Retrains a model on the current state of its repository, and deploys the new version if it is better."""
    if context.checkpoint_state is None:
        context.checkpoint(_initial_state(context, spec))
    state = cast(RetrainState, context.checkpoint_state)
    data = _prepare_data(context, spec, state)
    training = _training_spec(state, data)

    _begin_step(context, "validate_data")
    datasets = {part: data[part] and data[part]["dataset"] for part in ("train", "held_out")}
    data_check = context.child("validate_data", "validate_data", {**datasets, "base_model": training.base_model})
    (data_report,) = context.join(data_check)

    candidate = build_candidate(context, training, lambda step: _begin_step(context, step))
    name, version = candidate.export_result["name"], candidate.export_result["version"]

    _begin_step(context, "compare")
    compare_spec = CompareSpec(
        name=name,
        version=version,
        job_id=candidate.training_id,
        max_samples=training.max_samples,
        max_new_tokens=training.max_new_tokens,
    )
    compare_job = context.child("compare", "compare", compare_spec.model_dump(), resources_of("validate", training))
    (comparison,) = context.join(compare_job)

    deployed = None
    if comparison["promoted"] and state["auto_deploy"]:
        _begin_step(context, "deploy")
        deployed = deploy_version(context, name, version, training.gates)
    if spec.repository_id is not None:
        run_with_database(lambda database: _note_trained(database, spec, state, context.job_id))
    context.log(_outcome(comparison, deployed is not None))
    return {
        "model": name,
        "version": version,
        "commit": state["commit"],
        "promoted": comparison["promoted"],
        "reason": comparison["reason"],
        "data": data,
        "validate_data": data_report,
        "fine_tune": candidate.training_result,
        "export": candidate.export_result,
        "validate": candidate.validation_result,
        "compare": comparison,
        "deploy": deployed,
    }


async def get_or_enqueue(session: AsyncSession, spec: RetrainSpec, principal: Principal) -> tuple[Job, bool]:
    """Enqueue a plan, or return the unfinished one: a repository has one at a time. Also returns whether it is new."""
    if spec.repository_id is None:
        await advisory_lock(session, f"retrain {spec.feedback}")
    elif await session.get(Repository, spec.repository_id, with_for_update=True) is None:
        raise RepositoryNotFound(f"There is no repository '{spec.repository_id}'.")
    if existing := await find_unfinished(session, spec):
        return existing, False
    return await queue.enqueue(session, JobRequest(kind=RETRAIN_KIND, spec=spec.model_dump()), principal), True


async def find_unfinished(session: AsyncSession, spec: RetrainSpec) -> Job | None:
    """The unfinished plan of the same repository, or, without one, of the same model."""
    if spec.repository_id is not None:
        return await repositories.unfinished_plan(session, spec.repository_id)
    same = (Job.spec["repository_id"].as_string().is_(None), Job.spec["feedback"].as_string() == spec.feedback)
    plans = select(Job).where(Job.kind == RETRAIN_KIND, Job.state.not_in(FINISHED), *same)
    return await session.scalar(plans.order_by(Job.created_at).limit(1))


async def enqueue_after_feedback(session: AsyncSession, model: str) -> Job | None:
    """Start a plan if there is enough new feedback on a model. Returns it if it is new."""
    min_feedback = get_settings().guardian.min_feedback
    if min_feedback is None or REFERENCE_PATTERN.fullmatch(model) is None:
        return None
    # Not at each feedback beyond the minimum: if the plan fails, the next one starts after the same number again.
    count = await feedback_store.count_new(session, model)
    if count == 0 or count % min_feedback:
        return None
    repository = await session.scalar(select(Repository).where(Repository.model == model).limit(1))
    spec = RetrainSpec(repository_id=repository.id if repository else None, feedback=model)
    plan, is_new = await get_or_enqueue(session, spec, system(f"feedback:{model}"))
    return plan if is_new else None


def steps_of(*, repository: bool, feedback: bool, deploy: bool) -> list[str]:
    """The kinds of the steps of such a plan, in order."""
    left_out = {
        *([] if repository else ["extract_data"]),
        *([] if feedback else ["gather_feedback"]),
        *([] if deploy else ["deploy"]),
    }
    return [step for step in STEP_PROGRESS if step not in left_out]


def _initial_state(context: Context, spec: RetrainSpec) -> RetrainState:
    """Fix the input of this plan, and record it in the repository as the last attempt."""
    context.report(progress=0, phase="preparing")
    source = run_with_database(lambda database: _source(database, spec))
    repository = source.repository
    model = repository.model if repository else cast(str, spec.feedback)
    if repository is None:
        return RetrainState(
            model=model,
            commit=None,
            training=_previous_training(model),
            feedback=True,
            auto_deploy=spec.auto_deploy is not False,
        )
    commit = spec.commit or _newest_commit(context, repository)
    if commit == repository.trained_commit and not spec.force and not source.new_feedback:
        raise NothingNew(f"{repository.trained_job_id} already trained on {commit}: use force to train again.")
    run_with_database(lambda database: _note_tried(database, repository.id, commit, context.job_id))
    return RetrainState(
        model=model,
        commit=commit,
        training=repository.training,
        # Each training starts from the base model, so feedback that was once used must be used again.
        feedback=spec.feedback is not None or source.has_learned,
        auto_deploy=repository.auto_deploy if spec.auto_deploy is None else spec.auto_deploy,
    )


def _newest_commit(context: Context, repository: Repository) -> str:
    from pipelines.guardian.repository_access import open_registered

    with open_registered(repository, lambda line: context.report(phase=line or None)) as reader:
        return reader.tip().sha


def _prepare_data(context: Context, spec: RetrainSpec, state: RetrainState) -> dict[str, Any]:
    """Run the steps that make the datasets. Returns the datasets for training and the held-out ones."""
    data: dict[str, Any] = {}
    if spec.repository_id is not None:
        _begin_step(context, "extract_data")
        child_spec = {"repository_id": spec.repository_id, "commit": state["commit"]}
        (data,) = context.join(context.child("extract_data", "extract_data", child_spec))
    if state["feedback"]:
        _begin_step(context, "gather_feedback")
        extracted = {part: data[part]["dataset"] for part in ("train", "held_out") if data.get(part)}
        child_spec = {"model": state["model"], **extracted}
        (gathered,) = context.join(context.child("gather_feedback", "gather_feedback", child_spec))
        data = {**data, **gathered}
    return data


def _training_spec(state: RetrainState, data: dict[str, Any]) -> ForgeSpec:
    held_out = data["held_out"]
    fields = {
        "long_samples": "skip",  # one long function must not prevent the training
        **state["training"],
        "name": state["model"],
        "data": DataSource(dataset=data["train"]["dataset"]).model_dump(),
        "validation": held_out and DataSource(dataset=held_out["dataset"]).model_dump(),
    }
    return ForgeSpec.model_validate(fields)


def _previous_training(model: str) -> dict[str, Any]:
    """The training of a model without a repository: it starts from the served version, with the same settings."""
    served = asyncio.run(_find_version(model))
    before = run_with_database(lambda database: _spec_of(database, served.job_id))
    copied_fields = {
        "tuning",
        "rank",
        "alpha",
        "dropout",
        "target_modules",
        "unsloth",
        "epochs",
        "max_steps",
        "learning_rate",
    }
    copied_fields |= {"batch_size", "gradient_accumulation", "schedule", "warmup", "weight_decay", "seed", "max_length"}
    copied_fields |= {"workers", "cpus_per_worker", "gpus_per_worker", "labels"}
    return {**{name: value for name, value in before.items() if name in copied_fields}, "base_model": served.reference}


async def _find_version(model: str) -> Version:
    async with registry.connect() as models:
        return await models.find(model)


async def _spec_of(database: Database, job_id: str) -> dict[str, Any]:
    async with database.read_transaction() as session:
        job = await session.get(Job, job_id) if job_id else None
        return job.spec if job else {}


async def _source(database: Database, spec: RetrainSpec) -> _Source:
    async with database.read_transaction() as session:
        repository = await session.get(Repository, spec.repository_id) if spec.repository_id else None
        if spec.repository_id and repository is None:
            raise RepositoryNotFound(f"There is no repository '{spec.repository_id}'.")
        model = repository.model if repository else cast(str, spec.feedback)
        new = await feedback_store.count_new(session, model) if spec.feedback else 0
        return _Source(repository, await feedback_store.has_learned(session, model), new)


async def _note_tried(database: Database, repository_id: str, commit: str, job_id: str) -> None:
    async with database.transaction() as session:
        if repository := await session.get(Repository, repository_id, with_for_update=True):
            repository.tried_commit, repository.tried_job_id = commit, job_id


async def _note_trained(database: Database, spec: RetrainSpec, state: RetrainState, job_id: str) -> None:
    async with database.transaction() as session:
        if repository := await session.get(Repository, spec.repository_id, with_for_update=True):
            repository.trained_commit, repository.trained_job_id = state["commit"], job_id
            repository.trained_at = now()


def _outcome(comparison: dict[str, Any], deployed: bool) -> str:
    if deployed:
        return f"Deployed. {comparison['reason']}"
    status = "Promoted, but not deployed." if comparison["promoted"] else "Not promoted."
    return f"{status} {comparison['reason']}"


def _begin_step(context: Context, step: str) -> None:
    context.report(progress=STEP_PROGRESS[step], phase=step)
