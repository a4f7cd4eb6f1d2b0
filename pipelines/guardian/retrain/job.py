"""The kind `retrain`: the plan. From a repository, or from feedback, to a model that is served if it is better.

Its steps are jobs of their own. This one waits in between, and finds the steps that are done when it is called again.
"""

import asyncio
from dataclasses import dataclass
from typing import Any, Self, TypedDict, cast

from pydantic import Field, model_validator
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import Database, apart, now, one_at_a_time
from cluster.errors import UnprocessableRequest
from cluster.ownership import LOCAL, Owner
from cluster.settings import get_settings
from jobs import queue
from jobs.context import Context
from jobs.queue import JobRequest
from jobs.registry import job
from jobs.states import FINISHED
from jobs.tables import Job
from pipelines.guardian import repositories
from pipelines.guardian.feedback import store as feedback_store
from pipelines.guardian.repositories import RETRAIN, Repository, RepositoryNotFound
from pipelines.guardian.retrain.compare import CompareSpec
from pipelines.training.forge import deploy_version, make_candidate, resources_of
from pipelines.training.models import registry
from pipelines.training.models.versions import REFERENCE
from pipelines.training.spec import Data, ForgeSpec, ModelName, Spec

KIND = RETRAIN
SHARES = {
    "extract_data": 0,
    "gather_feedback": 12,
    "validate_data": 15,
    "fine_tune": 20,
    "export": 65,
    "validate": 75,
    "compare": 85,
    "deploy": 95,
}
"""Where in the whole, in percent, each step begins; in the order of the steps."""


class RetrainSpec(Spec):
    """Train the model of a repository, or of some feedback, again."""

    repository_id: str | None = Field(default=None, max_length=40)
    feedback: ModelName | None = Field(default=None, description="Learn from the feedback on this model too.")
    commit: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$", description="Null: the newest of its branch.")
    force: bool = Field(default=False, description="Even when nothing is new since the last training.")
    auto_deploy: bool | None = Field(default=None, description="Serve what is better. Null: as the repository says.")

    @model_validator(mode="after")
    def say_of_what(self) -> Self:
        if self.repository_id is None and self.feedback is None:
            raise ValueError("say of what: a repository_id, or the name of a model that there is feedback on")
        if self.repository_id is None and self.commit is not None:
            raise ValueError("a commit is one of a repository: say which, by repository_id")
        return self


class NothingNew(UnprocessableRequest):
    """Nothing is new since the last training."""

    code = "NOTHING_NEW"


class Outset(TypedDict):
    """What the plan goes by from its beginning to its end, whatever is changed meanwhile."""

    model: str
    commit: str | None
    training: dict[str, Any]
    feedback: bool
    auto_deploy: bool


@dataclass(frozen=True)
class _Source:
    """What the model is made of, as the database tells it."""

    repository: Repository | None
    has_learned: bool
    new_feedback: int


@job(RETRAIN, spec=RetrainSpec, admin_only=True, tracked=True)
def retrain(context: Context, spec: RetrainSpec) -> dict[str, Any]:
    """Trains a model on its repository as it is now, and serves the new version if it is better than the old one."""
    if context.checkpoint_state is None:
        context.checkpoint(_set_out(context, spec))
    outset = cast(Outset, context.checkpoint_state)
    data = _data(context, spec, outset)
    training = _training(outset, data)

    _begin(context, "validate_data")
    wanted = {part: data[part] and data[part]["dataset"] for part in ("train", "held_out")}
    examined = context.child("validate_data", "validate_data", {**wanted, "base_model": training.base_model})
    (counted,) = context.join(examined)

    candidate = make_candidate(context, training, lambda step: _begin(context, step))
    name, version = candidate.exported["name"], candidate.exported["version"]

    _begin(context, "compare")
    question = CompareSpec(
        name=name,
        version=version,
        job_id=candidate.training_id,
        max_samples=training.max_samples,
        max_new_tokens=training.max_new_tokens,
    )
    beside = context.child("compare", "compare", question.model_dump(), resources_of("validate", training))
    (comparison,) = context.join(beside)

    deployed = None
    if comparison["promoted"] and outset["auto_deploy"]:
        _begin(context, "deploy")
        deployed = deploy_version(context, name, version)
    if spec.repository_id is not None:
        asyncio.run(apart(lambda database: _note_trained(database, spec, outset, context.job_id)))
    context.log(_outcome(comparison, deployed is not None))
    return {
        "model": name,
        "version": version,
        "commit": outset["commit"],
        "promoted": comparison["promoted"],
        "reason": comparison["reason"],
        "data": data,
        "validate_data": counted,
        "fine_tune": candidate.trained,
        "export": candidate.exported,
        "validate": candidate.validated,
        "compare": comparison,
        "deploy": deployed,
    }


async def ask(session: AsyncSession, spec: RetrainSpec, owner: Owner = LOCAL) -> tuple[Job, bool]:
    """The plan that does this, and whether it is a new one: there is one at a time of each repository."""
    if spec.repository_id is None:
        await one_at_a_time(session, f"retrain {spec.feedback}")
    elif await session.get(Repository, spec.repository_id, with_for_update=True) is None:
        raise RepositoryNotFound(f"There is no repository '{spec.repository_id}'.")
    if known := await unfinished(session, spec):
        return known, False
    return await queue.enqueue(session, JobRequest(kind=RETRAIN, spec=spec.model_dump()), owner), True


async def unfinished(session: AsyncSession, spec: RetrainSpec) -> Job | None:
    """The plan for the same repository, or else the same model, that has not come to its end."""
    if spec.repository_id is not None:
        return await repositories.unfinished_plan(session, spec.repository_id)
    same = (Job.spec["repository_id"].as_string().is_(None), Job.spec["feedback"].as_string() == spec.feedback)
    plans = select(Job).where(Job.kind == RETRAIN, Job.state.not_in(FINISHED), *same)
    return await session.scalar(plans.order_by(Job.created_at).limit(1))


async def ask_after_feedback(session: AsyncSession, model: str) -> Job | None:
    """The plan that enough new feedback on a model has started, if this was what was missing."""
    least = get_settings().guardian.min_feedback
    if least is None or REFERENCE.fullmatch(model) is None:
        return None
    # Not with each one from then on: should the plan fail, it is tried again after as many more.
    count = await feedback_store.count_new(session, model)
    if count == 0 or count % least:
        return None
    made_of = await session.scalar(select(Repository).where(Repository.model == model).limit(1))
    spec = RetrainSpec(repository_id=made_of.id if made_of else None, feedback=model)
    plan, is_new = await ask(session, spec, Owner(name=f"feedback:{model}"))
    return plan if is_new else None


def steps_of(*, repository: bool, feedback: bool, deploy: bool) -> list[str]:
    """The steps of such a plan, by the names of their kinds."""
    left_out = {
        *([] if repository else ["extract_data"]),
        *([] if feedback else ["gather_feedback"]),
        *([] if deploy else ["deploy"]),
    }
    return [step for step in SHARES if step not in left_out]


def _set_out(context: Context, spec: RetrainSpec) -> Outset:
    """What this plan goes by. From now on it is the last one that was tried."""
    context.report(progress=0, phase="setting out")
    source = asyncio.run(apart(lambda database: _source(database, spec)))
    repository = source.repository
    model = repository.model if repository else cast(str, spec.feedback)
    if repository is None:
        return Outset(
            model=model,
            commit=None,
            training=asyncio.run(_as_before(model)),
            feedback=True,
            auto_deploy=spec.auto_deploy is not False,
        )
    commit = spec.commit or _newest(context, repository)
    if commit == repository.trained_commit and not spec.force and not source.new_feedback:
        raise NothingNew(f"{repository.trained_job_id} has trained on {commit} already: force it to do it once more.")
    asyncio.run(apart(lambda database: _note_tried(database, repository.id, commit, context.job_id)))
    return Outset(
        model=model,
        commit=commit,
        training=repository.training,
        # What was learned from once is learned from ever after: each training begins with the base model.
        feedback=spec.feedback is not None or source.has_learned,
        auto_deploy=repository.auto_deploy if spec.auto_deploy is None else spec.auto_deploy,
    )


def _newest(context: Context, repository: Repository) -> str:
    from pipelines.guardian.repository_access import opened

    with opened(repository, lambda line: context.report(phase=line or None)) as checkout:
        return checkout.tip().sha


def _data(context: Context, spec: RetrainSpec, outset: Outset) -> dict[str, Any]:
    """The datasets to learn from and to measure on, from the steps that make them."""
    found: dict[str, Any] = {}
    if spec.repository_id is not None:
        _begin(context, "extract_data")
        wanted = {"repository_id": spec.repository_id, "commit": outset["commit"]}
        (found,) = context.join(context.child("extract_data", "extract_data", wanted))
    if outset["feedback"]:
        _begin(context, "gather_feedback")
        beside = {part: found[part]["dataset"] for part in ("train", "held_out") if found.get(part)}
        wanted = {"model": outset["model"], **beside}
        (gathered,) = context.join(context.child("gather_feedback", "gather_feedback", wanted))
        found = {**found, **gathered}
    return found


def _training(outset: Outset, data: dict[str, Any]) -> ForgeSpec:
    held_out = data["held_out"]
    told = {
        "long_samples": "skip",  # a long function is no reason to learn nothing of the others
        **outset["training"],
        "name": outset["model"],
        "data": Data(dataset=data["train"]["dataset"]).model_dump(),
        "validation": held_out and Data(dataset=held_out["dataset"]).model_dump(),
    }
    return ForgeSpec.model_validate(told)


async def _as_before(model: str) -> dict[str, Any]:
    """A model without a repository goes on from what is served, trained in the same way."""
    async with registry.connect() as models:
        served = await models.find(model)
    before = await apart(lambda database: _spec_of(database, served.job_id))
    kept = {"tuning", "rank", "alpha", "dropout", "target_modules", "unsloth", "epochs", "max_steps", "learning_rate"}
    kept |= {"batch_size", "gradient_accumulation", "schedule", "warmup", "weight_decay", "seed", "max_length"}
    kept |= {"workers", "cpus_per_worker", "gpus_per_worker", "labels"}
    return {**{name: value for name, value in before.items() if name in kept}, "base_model": served.reference}


async def _spec_of(database: Database, job_id: str) -> dict[str, Any]:
    async with database.reading() as session:
        job = await session.get(Job, job_id) if job_id else None
        return job.spec if job else {}


async def _source(database: Database, spec: RetrainSpec) -> _Source:
    async with database.reading() as session:
        repository = await session.get(Repository, spec.repository_id) if spec.repository_id else None
        if spec.repository_id and repository is None:
            raise RepositoryNotFound(f"There is no repository '{spec.repository_id}'.")
        model = repository.model if repository else cast(str, spec.feedback)
        new = await feedback_store.count_new(session, model) if spec.feedback else 0
        return _Source(repository, await feedback_store.was_learned(session, model), new)


async def _note_tried(database: Database, repository_id: str, commit: str, job_id: str) -> None:
    async with database.transaction() as session:
        if repository := await session.get(Repository, repository_id, with_for_update=True):
            repository.tried_commit, repository.tried_job_id = commit, job_id


async def _note_trained(database: Database, spec: RetrainSpec, outset: Outset, job_id: str) -> None:
    async with database.transaction() as session:
        if repository := await session.get(Repository, spec.repository_id, with_for_update=True):
            repository.trained_commit, repository.trained_job_id = outset["commit"], job_id
            repository.trained_at = now()


def _outcome(comparison: dict[str, Any], deployed: bool) -> str:
    if deployed:
        return f"Served from now on. {comparison['reason']}"
    kept = "It waits to be deployed." if comparison["promoted"] else "It stays a candidate."
    return f"{kept} {comparison['reason']}"


def _begin(context: Context, step: str) -> None:
    context.report(progress=SHARES[step], phase=step)
