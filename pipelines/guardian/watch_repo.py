"""The kind `watch_repo`: check whether a repository has changed enough, and start its retraining."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import Database, now, run_with_database
from cluster.errors import ForgearrError
from cluster.ownership import Principal, system
from jobs import queue
from jobs.context import Context
from jobs.queue import JobRequest
from jobs.registry import job
from jobs.tables import Job
from pipelines.guardian.feedback.store import count_new
from pipelines.guardian.policy import Decision, Policy, decide
from pipelines.guardian.repositories import Repository, RepositoryNotFound
from pipelines.guardian.retrain import job as retrain_job
from pipelines.guardian.retrain.job import RetrainSpec

WATCH_REPO_KIND = "watch_repo"
GUARDIAN = system("guardian")


class WatchSpec(BaseModel):
    """The repository to check."""

    model_config = ConfigDict(extra="forbid")

    repository_id: str = Field(max_length=40)


@dataclass(frozen=True)
class RepoState:
    """The newest commit of a repository, and what the policy decides about it."""

    commit: str
    decision: Decision


async def enqueue_watch(
    session: AsyncSession, repository: Repository, principal: Principal, *, idempotency_key: str | None = None
) -> Job:
    """Enqueue a check of this repository, or return the one that is queued. A running one may have read too early."""
    request = JobRequest(kind=WATCH_REPO_KIND, spec={"repository_id": repository.id})
    return await queue.enqueue(session, request, principal, idempotency_key=idempotency_key, unless_queued=True)


@job(WATCH_REPO_KIND, spec=WatchSpec, admin_only=True, routine=True)
def watch_repo(context: Context, spec: WatchSpec) -> dict[str, Any]:
    """Checks whether a repository has changed enough, and if so, starts the retraining of its model."""
    found = run_with_database(lambda database: _find(database, spec.repository_id))
    if found is None:
        return {"watched": False, "reason": "It is no longer registered."}
    repository, feedback = found
    context.report(phase="looking")
    try:
        state = evaluate_repository(repository, feedback, lambda line: context.report(phase=line or None))
    except ForgearrError as error:
        message = error.message
        run_with_database(lambda database: _note_error(database, spec.repository_id, message))
        raise
    plan, reason = run_with_database(lambda database: _record_state(database, spec.repository_id, state))
    context.log(reason)
    return {
        "watched": True,
        "repository": repository.name,
        "commit": state.commit,
        "reason": reason,
        "retrain_job_id": plan,
        "decision": state.decision.model_dump(mode="json"),
    }


def evaluate_repository(
    repository: Repository, feedback: int, on_progress: Callable[[str], None] = lambda _: None
) -> RepoState:
    """Apply the policy of the repository to its current state. `feedback` is the amount of new feedback."""
    from pipelines.guardian.repository_access import open_registered

    with open_registered(repository, on_progress) as reader:
        tip = reader.tip().sha
        changes = reader.changes(repository.trained_commit, tip)
    policy = Policy.model_validate(repository.policy)
    return RepoState(tip, decide(policy, changes, repository.trained_at, now(), feedback))


def evaluate_folder(folder: Path) -> Decision:
    """Apply the default policy to a folder that is not registered."""
    from pipelines.guardian.git.repo import open_inside_roots

    with open_inside_roots(folder) as reader:
        changes = reader.changes(None, reader.tip().sha)
    return decide(Policy(), changes, None, now())


async def _find(database: Database, repository_id: str) -> tuple[Repository, int] | None:
    async with database.read_transaction() as session:
        repository = await session.get(Repository, repository_id)
        return repository and (repository, await count_new(session, repository.model))


async def _note_error(database: Database, repository_id: str, message: str) -> None:
    async with database.transaction() as session:
        if repository := await session.get(Repository, repository_id, with_for_update=True):
            repository.checked_at, repository.check_error = now(), message


async def _record_state(database: Database, repository_id: str, state: RepoState) -> tuple[str | None, str]:
    """Store the state, and start a plan if the decision says so. Returns the plan's id, if any, and the reason."""
    async with database.transaction() as session:
        repository = await session.get(Repository, repository_id, with_for_update=True)
        if repository is None:
            raise RepositoryNotFound("The repository was deleted while it was checked.")
        repository.seen_commit, repository.checked_at, repository.check_error = state.commit, now(), None
        reason = state.decision.reason
        if not state.decision.should_retrain:
            return None, reason
        if repository.tried_commit == state.commit:
            return None, f"{reason}; but {repository.tried_job_id} has tried this commit already"
        spec = RetrainSpec(repository_id=repository.id, commit=state.commit)
        plan, is_new = await retrain_job.get_or_enqueue(session, spec, GUARDIAN)
        return plan.id, reason if is_new else f"{reason}; {plan.id} is under way"
