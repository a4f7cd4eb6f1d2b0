"""The kind `forge`: fine-tune, export, validate and deploy a model in one job."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from jobs.context import Context
from jobs.registry import Resources, job
from pipelines.training.data import resolution
from pipelines.training.spec import DeploySpec, ExportSpec, FineTuneSpec, ForgeSpec, Gates, ValidateSpec, gates_choice

PROGRESS_RANGES = {"fine_tune": (0, 60), "export": (60, 75), "validate": (75, 90), "deploy": (90, 100)}
"""The part of the whole progress, in percent, that each step covers."""


def _admin_choice(spec: ForgeSpec) -> str | None:
    """Deploying a model affects all users, so it needs an administrator."""
    return "deploy: true" if spec.deploy else gates_choice(spec) or resolution.admin_choice(spec)


@job("forge", spec=ForgeSpec, admin_only=_admin_choice, tracked=True)
def forge(context: Context, spec: ForgeSpec) -> dict[str, Any]:
    """Fine-tunes, exports, validates and deploys a model.

    Each step is a job of its own, with its own resources, attempts and MLflow run. This job parks meanwhile. When it is
    called again, it finds the results of the finished steps.
    """
    candidate = build_candidate(context, spec, lambda step: _report_step(context, step))
    export_result, validation_result = candidate.export_result, candidate.validation_result
    deploy_result = None
    if spec.deploy and (validation_result["passed"] or spec.force):
        _report_step(context, "deploy")
        name, version = export_result["name"], export_result["version"]
        deploy_result = deploy_version(context, name, version, spec.gates, force=spec.force)
    elif spec.deploy:
        context.log(f"Not deployed, because validation failed: {'; '.join(validation_result['reasons'])}", "WARNING")
    return {
        "name": spec.full_name,
        "version": export_result["version"],
        "passed": validation_result["passed"],
        "fine_tune": candidate.training_result,
        "export": export_result,
        "validate": validation_result,
        "deploy": deploy_result,
    }


@dataclass(frozen=True)
class Candidate:
    """A version that could be served, and the results of the steps that made it."""

    training_id: str
    training_result: dict[str, Any]
    export_result: dict[str, Any]
    validation_result: dict[str, Any]


def build_candidate(context: Context, spec: ForgeSpec, on_step: Callable[[str], None]) -> Candidate:
    """Fine-tune, export and validate, as children of this job. `on_step` is called before each step."""
    on_step("fine_tune")
    training = context.child("fine_tune", "fine_tune", spec.model_dump(include=set(FineTuneSpec.model_fields)))
    (training_result,) = context.join(training)

    on_step("export")
    export_spec = ExportSpec(job_id=training.id, quantizations=spec.quantizations, adapter=spec.adapter)
    export = context.child("export", "export", export_spec.model_dump(), resources_of("export", spec))
    (export_result,) = context.join(export)

    on_step("validate")
    validate_spec = ValidateSpec(
        job_id=training.id,
        export_job_id=export.id,
        max_samples=spec.max_samples,
        max_new_tokens=spec.max_new_tokens,
        gates=spec.gates,
    )
    validation = context.child("validate", "validate", validate_spec.model_dump(), resources_of("validate", spec))
    (validation_result,) = context.join(validation)
    return Candidate(training.id, training_result, export_result, validation_result)


def deploy_version(context: Context, name: str, version: int, gates: Gates, *, force: bool = False) -> dict[str, Any]:
    """Serve a version, as a child of this job, if it passes by the gates with which this job has validated it."""
    deploy_spec = DeploySpec(name=name, version=version, gates=gates, force=force)
    (deploy_result,) = context.join(context.child("deploy", "deploy", deploy_spec.model_dump()))
    return deploy_result


def resources_of(step: Literal["export", "validate"], training: FineTuneSpec) -> Resources:
    """The resources of a step: those of one process of the training, but a GPU only for validation."""
    gpus = min(training.gpus_per_worker, 1) if step == "validate" else 0
    return Resources(cpus=training.cpus_per_worker, gpus=gpus)


def _report_step(context: Context, step: str) -> None:
    context.report(progress=PROGRESS_RANGES[step][0], phase=step)
