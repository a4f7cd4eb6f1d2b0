"""The kind `forge`: from data to a served model, in one submission."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from jobs.context import Context
from jobs.registry import Resources, job
from pipelines.training.data.resolution import needs_admin
from pipelines.training.spec import DeploySpec, ExportSpec, FineTuneSpec, ForgeSpec, ValidateSpec

SHARES = {"fine_tune": (0, 60), "export": (60, 75), "validate": (75, 90), "deploy": (90, 100)}
"""Where in the whole, in percent, each step begins and ends."""


def _needs_admin(spec: ForgeSpec) -> bool:
    """What is served is everybody's business."""
    return spec.deploy or needs_admin(spec)


@job("forge", spec=ForgeSpec, admin_only=_needs_admin, tracked=True)
def forge(context: Context, spec: ForgeSpec) -> dict[str, Any]:
    """Fine-tunes, exports, validates and deploys a model.

    Each step is a job of its own, with its own resources, attempts and run in MLflow. This one waits in between, and
    finds the steps that are done when it is called again.
    """
    candidate = make_candidate(context, spec, lambda step: _begin(context, step))
    exported, validated = candidate.exported, candidate.validated
    deployed = None
    if spec.deploy and (validated["passed"] or spec.force):
        _begin(context, "deploy")
        deployed = deploy_version(context, exported["name"], exported["version"], force=spec.force)
    elif spec.deploy:
        context.log(f"Not deployed, because it did not pass: {'; '.join(validated['reasons'])}", "WARNING")
    return {
        "name": spec.full_name,
        "version": exported["version"],
        "passed": validated["passed"],
        "fine_tune": candidate.trained,
        "export": exported,
        "validate": validated,
        "deploy": deployed,
    }


@dataclass(frozen=True)
class Candidate:
    """A version that could be served, and the results of the steps that have made it."""

    training_id: str
    trained: dict[str, Any]
    exported: dict[str, Any]
    validated: dict[str, Any]


def make_candidate(context: Context, spec: ForgeSpec, begin: Callable[[str], None]) -> Candidate:
    """Fine-tune, export and validate, as children of this job. `begin` hears of each step that comes next."""
    begin("fine_tune")
    training = context.child("fine_tune", "fine_tune", spec.model_dump(include=set(FineTuneSpec.model_fields)))
    (trained,) = context.join(training)

    begin("export")
    wanted = ExportSpec(job_id=training.id, quantizations=spec.quantizations, adapter=spec.adapter)
    export = context.child("export", "export", wanted.model_dump(), resources_of("export", spec))
    (exported,) = context.join(export)

    begin("validate")
    check = ValidateSpec(
        job_id=training.id,
        export_job_id=export.id,
        max_samples=spec.max_samples,
        max_new_tokens=spec.max_new_tokens,
        gates=spec.gates,
    )
    validation = context.child("validate", "validate", check.model_dump(), resources_of("validate", spec))
    (validated,) = context.join(validation)
    return Candidate(training.id, trained, exported, validated)


def deploy_version(context: Context, name: str, version: int, *, force: bool = False) -> dict[str, Any]:
    """Serve a version, as a child of this job."""
    target = DeploySpec(name=name, version=version, force=force)
    (deployed,) = context.join(context.child("deploy", "deploy", target.model_dump()))
    return deployed


def resources_of(step: Literal["export", "validate"], training: FineTuneSpec) -> Resources:
    """What a step occupies: as much as one process of the training did, but only models that answer need a GPU."""
    gpus = min(training.gpus_per_worker, 1) if step == "validate" else 0
    return Resources(cpus=training.cpus_per_worker, gpus=gpus)


def _begin(context: Context, step: str) -> None:
    context.report(progress=SHARES[step][0], phase=step)
