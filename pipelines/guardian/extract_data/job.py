"""The kind `extract_data`: turn a commit of a repository into two datasets, for training and held out."""

from typing import TYPE_CHECKING, Any

from pydantic import Field

from cluster.db import Database, run_with_database
from cluster.errors import UnprocessableRequest
from cluster.settings import get_settings, home
from jobs.context import Context
from jobs.execution import workspace
from jobs.registry import Resources, job
from pipelines.guardian import repositories
from pipelines.guardian.repositories import Repository
from pipelines.training.spec import Spec

if TYPE_CHECKING:
    from pipelines.guardian.extract_data.pipeline import ExtractionResult, Limits
    from pipelines.training.data.content import SampleFile

MAX_LOGGED_LEAKS = 20
MAX_NAME_CHARACTERS = 80
"""The part of a repository's name that goes into the names of its datasets."""


class NothingToExtract(UnprocessableRequest):
    """The repository has nothing to train on."""

    code = "NOTHING_TO_EXTRACT"


class ExtractSpec(Spec):
    repository_id: str = Field(min_length=1, max_length=100, description="Its id or name.")
    commit: str | None = Field(
        default=None, pattern=r"^[0-9a-f]{4,64}$", description="Null: the newest of the repository's branch."
    )
    held_out: float | None = Field(default=None, ge=0, le=0.5, description="Null: guardian.held_out of the settings.")
    processes: int = Field(default=1, ge=1, le=64, description="The number of processes that read files.")


def _resources(spec: ExtractSpec) -> Resources:
    return Resources(cpus=spec.processes)


@job("extract_data", spec=ExtractSpec, admin_only=True, resources=_resources, tracked=True)
def extract_data(context: Context, spec: ExtractSpec) -> dict[str, Any]:
    """Turns the code, documents and commits of a repository into training data.

    Files that were extracted before are not read again. A pause takes effect between two batches of files; the batches
    before it are cached.
    """
    from pipelines.guardian.extract_data import pipeline as extract_data_pipeline
    from pipelines.guardian.repository_access import open_registered

    repository = run_with_database(lambda database: _find(database, spec.repository_id))
    requested_commit: str | None = context.checkpoint_state or spec.commit
    context.report(progress=0, phase="fetch")
    with (
        open_registered(repository, commits=[requested_commit] if requested_commit else []) as reader,
        workspace.temporary_folder(context.job_id) as folder,
    ):
        commit = (reader.commit(requested_commit) if requested_commit else reader.tip()).sha
        context.checkpoint(commit)  # newer commits are for the next training

        def report(fraction: float, phase: str) -> None:
            context.report(progress=100 * fraction, phase=phase)
            if context.should_stop():
                context.checkpoint(commit)

        cache = home() / "cache" / "extraction" / f"{repository.id}.sqlite"
        result = extract_data_pipeline.extract(reader, commit, folder, cache, _limits(spec), report, spec.processes)
        _log_leaks(context, result)
        return _result(context, repository, commit, result)


async def _find(database: Database, repository_id: str) -> Repository:
    async with database.read_transaction() as session:
        return await repositories.find(session, repository_id)


def _limits(spec: ExtractSpec) -> "Limits":
    from pipelines.guardian.extract_data.pipeline import Limits

    settings = get_settings().guardian
    return Limits(
        held_out=settings.held_out if spec.held_out is None else spec.held_out,
        characters=settings.max_characters,
        file_bytes=settings.max_file_kb * 1024,
        commits=settings.commits,
    )


def _log_leaks(context: Context, result: "ExtractionResult") -> None:
    for leak in result.leaks[:MAX_LOGGED_LEAKS]:
        location = leak.get("path") or f"commit {leak['commit']}"
        context.log(f"{location}:{leak['line']}: a secret ({leak['kind']}). Samples with it are left out.", "WARNING")
    if (more := sum(result.secrets.values()) - MAX_LOGGED_LEAKS) > 0:
        context.log(f"{more} more secrets; the job's result counts them by kind.", "WARNING")


def _result(context: Context, repository: Repository, commit: str, result: "ExtractionResult") -> dict[str, Any]:
    written = result.written
    if written.train is None:
        raise NothingToExtract(
            f"{repository.name} has nothing to train on at {commit[:12]}: {result.files} files, of which "
            f"{_numbers(result.skipped) or 'none'} are skipped, and {result.withheld} samples with secrets.",
            details={"files": result.files, "skipped": dict(result.skipped), "secrets": dict(result.secrets)},
        )
    return {
        "repository": repository.name,
        "repository_id": repository.id,
        "commit": commit,
        "train": _save_dataset(context, repository, commit, "train", written.train),
        "held_out": _save_dataset(context, repository, commit, "held-out", written.held_out),
        "files": result.files,
        "commits": result.commits,
        "extracted": result.extracted,
        "unchanged": result.unchanged,
        "skipped": dict(sorted(result.skipped.items())),
        "secrets": dict(sorted(result.secrets.items())),
        "leaks": result.leaks,
        "withheld": result.withheld,
        "duplicates": written.duplicates,
        "by_kind": dict(sorted(written.by_kind.items())),
        "by_language": dict(sorted(written.by_language.items())),
        "seconds": result.seconds,
    }


def _save_dataset(
    context: Context, repository: Repository, commit: str, side: str, content: "SampleFile | None"
) -> dict[str, Any] | None:
    from pipelines.training.data import datasets

    if content is None:
        return None
    name = f"repo/{repository.name[:MAX_NAME_CHARACTERS].rstrip('-.')}/{side}"
    source = {"repository": repository.name, "commit": commit}
    dataset = datasets.store_for_owner(context.owner_id, name, content, source)
    context.input(name, content.digest, dataset.address, samples=content.samples)
    return {"dataset": dataset.id, "name": f"{dataset.name}:v{dataset.version}", "samples": content.samples}


def _numbers(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
