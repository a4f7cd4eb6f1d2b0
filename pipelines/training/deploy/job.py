"""The kind `deploy`: make a version NAME:latest. Also the rollback to the version before.

A version is fetched, loaded by every engine and pushed to Ollama before the alias moves. If one of these steps fails,
the old version stays served. Requests during a deployment are answered by the old version or by the new one.
"""

import asyncio
from pathlib import Path
from typing import Any

from cluster import audit_log
from cluster.db import Database, run_with_database
from cluster.errors import Conflict, ForgearrError, Unavailable
from cluster.ownership import Principal
from cluster.settings import get_settings
from jobs import outputs
from jobs.context import Context
from jobs.registry import job
from jobs.tables import Job
from pipelines.training.deploy import ollama_push
from pipelines.training.deploy.ollama_push import OllamaRefused, OllamaUnavailable
from pipelines.training.models import registry
from pipelines.training.models.versions import Version
from pipelines.training.spec import DeploySpec, Gates
from pipelines.training.validate.job import check_gates

ENGINE_DEPLOYMENT = "gguf"


class VersionNotPassed(Conflict):
    """A version that has not passed its validation is only deployed with force."""

    code = "VERSION_NOT_PASSED"


class EngineUnavailable(Unavailable):
    """The engine that runs GGUF models does not answer."""

    code = "ENGINE_UNAVAILABLE"


class EngineRefused(ForgearrError):
    """The engine that runs GGUF models could not load a version."""

    code = "ENGINE_REFUSED"


# One at a time, so that the later one of two deployments is served in the end.
@job("deploy", spec=DeploySpec, admin_only=True, tracked=True, concurrency=1)
def deploy(context: Context, spec: DeploySpec) -> dict[str, Any]:
    """Serves a version of a model as NAME:latest, and pushes it to Ollama if one is configured."""
    return asyncio.run(_deploy(context, spec))


def require_validated(version: Version, force: bool, gates: Gates | None = None) -> None:
    """Raise VersionNotPassed unless the version passes by the gates of the settings, or by those of this deployment.

    Its verdict may be older than the settings, or reached with gates of its own.
    """
    if not force and (fault := _find_fault(version, gates)):
        raise VersionNotPassed(f"{version.reference} is not deployed: {fault} Use force to deploy it anyway.")


async def roll_back(name: str) -> tuple[Version, int, str | None]:
    """Serve the version that was served before, without a job.

    Returns that version, the number of the one that it replaces, and warnings: Ollama could not be updated, or the
    version does not pass the gates. Neither prevents the rollback: an administrator has deployed that version before.
    """
    async with registry.connect() as models:
        version, replaced = await models.roll_back(name)
    fault = _find_fault(version)
    warnings = [f"{version.reference} is served, but {fault}"] if fault else []
    url = get_settings().ollama.url
    try:
        if url is not None:
            await asyncio.to_thread(ollama_push.set_latest, url, version)
    except (OllamaUnavailable, OllamaRefused) as error:
        warnings.append(f"{error.message} There, {name}:latest is still another version.")
    return version, replaced, " ".join(warnings) or None


async def retire(name: str) -> tuple[Version, str | None]:
    """Serve no version of a model any more, without a job. Its versions stay, and can be deployed again.

    Returns the version that was served, and a warning if Ollama could not be updated.
    """
    async with registry.connect() as models:
        version = await models.retire(name)
    url = get_settings().ollama.url
    if url is None or version.is_adapter:
        return version, None
    try:
        await asyncio.to_thread(ollama_push.remove_latest, url, name)
    except (OllamaUnavailable, OllamaRefused) as error:
        return version, f"{error.message} There, {name}:latest is still {version.reference}."
    return version, None


async def _deploy(context: Context, spec: DeploySpec) -> dict[str, Any]:
    try:
        result = await _serve_version(context, spec)
    except ForgearrError as error:
        target = spec.export_job_id or f"{spec.name}:v{spec.version}"
        outcome = "refused" if isinstance(error, VersionNotPassed) else "failed"
        await _record(context, target, outcome, reason=error.message)
        raise
    reference = f"{result['name']}:v{result['version']}"
    await _record(context, reference, "succeeded", previous=result["previous"], forced=spec.force)
    return result


async def _record(context: Context, target: str, outcome: audit_log.Outcome, **details: Any) -> None:
    async def write(database: Database) -> None:
        async with database.transaction() as session:
            job = await session.get_one(Job, context.job_id)
            owner = Principal(id=job.owner_id, name=job.created_by)
            audit_log.record(session, "model.deploy", owner, target, outcome=outcome, job_id=job.id, **details)

    await asyncio.to_thread(run_with_database, write)


async def _serve_version(context: Context, spec: DeploySpec) -> dict[str, Any]:
    async with registry.connect() as models:
        if spec.export_job_id is not None:
            version = await models.find_export(spec.export_job_id)
        else:
            version = await models.find(await asyncio.to_thread(_reference, spec, context.owner_id))
        require_validated(version, spec.force, spec.gates)
        if fault := _find_fault(version, spec.gates):
            context.log(f"{version.reference} is deployed by force: {fault}", "WARNING")

        context.report(progress=0, phase="fetching")

        def on_progress(done: int, total: int) -> None:
            context.report(progress=40 * done / max(total, 1))

        path = await models.fetch(version, on_progress=on_progress)
        context.report(progress=40, phase="loading")
        await asyncio.to_thread(_load_on_engine, context, version.reference)
        pushed = await _push_to_ollama(context, version, path)
        context.report(progress=95, phase="switching")
        previous = await models.set_served(version.name, version.number)
    return {
        "name": version.name,
        "model_name": f"{version.name}:latest",
        "version": version.number,
        "previous": previous,
        "gguf_path": str(path),
        "ollama": pushed,
    }


def _reference(spec: DeploySpec, owner_id: str | None) -> str:
    if spec.export_job_id is None:
        return f"{spec.name}:v{spec.version}"
    export_result = outputs.get_output(spec.export_job_id, "export", owner_id).result
    return f"{export_result['name']}:v{export_result['version']}"


def _find_fault(version: Version, gates: Gates | None = None) -> str | None:
    """Why a version should not be served, if there is a reason."""
    if version.passed is None:
        return "it was never validated."
    if not version.passed:
        return f"it did not pass its validation: {'; '.join(version.reasons) or 'its report says why'}."
    metrics = (version.validation or {}).get("metrics", {})
    limits = get_settings().gates.model_dump()
    reasons = check_gates(metrics, {**limits, **gates} if gates else limits, with_gguf=True)
    if not reasons:
        return None
    return f"it passed its validation with other gates, but by those that count now it fails: {'; '.join(reasons)}."


def _load_on_engine(context: Context, reference: str) -> None:
    """Load a version in every replica of the engine, beside the models that it has loaded."""
    if not get_settings().engines.replicas:
        context.log("No engine is configured (engines.replicas is 0), so none loads it.")
        return
    from ray import serve as ray_serve
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import RayServeException

    try:
        engine: Any = ray_serve.get_deployment_handle(ENGINE_DEPLOYMENT, app_name=get_settings().ray_namespace)
        if not engine.is_initialized:
            # Serve's throughput mode would bind the handle to the caller's event loop, and a job's loop does not last.
            engine._init(_run_router_in_separate_loop=True)
        engine.load.remote(reference).result()  # starts a replica if none is running
        engine.broadcast("load", reference).results()
    except RayTaskError as error:
        if isinstance(error.cause, ForgearrError):
            raise error.cause from error
        raise EngineRefused(f"The engine could not load {reference}: {error.cause}") from error
    except (KeyError, RayError, RayServeException) as error:
        raise EngineUnavailable(
            f"The engine that runs GGUF models does not answer ({type(error).__name__})."
        ) from error


async def _push_to_ollama(context: Context, version: Version, path: Path) -> dict[str, str] | None:
    url = get_settings().ollama.url
    if url is None:
        return None
    if version.is_adapter:
        context.log(f"{version.reference} is not pushed to Ollama: it is an adapter on a model of this installation.")
        return None
    context.report(progress=60, phase="pushing to Ollama")
    return await asyncio.to_thread(ollama_push.push, url, version, path)
