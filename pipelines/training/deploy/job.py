"""The kind `deploy`: make a version NAME:latest. Also the rollback to the version before.

A version is fetched, loaded by every engine and pushed to Ollama before the alias moves. If one of these steps fails,
the old version stays served. Requests during a deployment are answered by the old version or by the new one.
"""

import asyncio
from pathlib import Path
from typing import Any

from cluster.errors import Conflict, ForgearrError, Unavailable
from cluster.settings import get_settings
from jobs import outputs
from jobs.context import Context
from jobs.registry import job
from pipelines.training.deploy import ollama_push
from pipelines.training.deploy.ollama_push import OllamaRefused, OllamaUnavailable
from pipelines.training.models import registry
from pipelines.training.models.versions import Version
from pipelines.training.spec import DeploySpec

ENGINE_DEPLOYMENT, SERVE_APPLICATION = "gguf", "forgearr"


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


def require_validated(version: Version, force: bool) -> None:
    if version.passed is not True and not force:
        raise VersionNotPassed(
            f"{version.reference} is not deployed: {_validation_summary(version)} Use force to deploy it anyway."
        )


async def roll_back(name: str) -> tuple[Version, int, str | None]:
    """Serve the version that was served before, without a job.

    Returns that version, the number of the one that it replaces, and a warning if Ollama could not be updated. An
    Ollama that is down does not prevent the rollback here.
    """
    async with registry.connect() as models:
        version, replaced = await models.roll_back(name)
    url = get_settings().ollama.url
    if url is None:
        return version, replaced, None
    try:
        await asyncio.to_thread(ollama_push.set_latest, url, version)
    except (OllamaUnavailable, OllamaRefused) as error:
        return version, replaced, f"{error.message} There, {name}:latest is still another version."
    return version, replaced, None


async def _deploy(context: Context, spec: DeploySpec) -> dict[str, Any]:
    async with registry.connect() as models:
        if spec.export_job_id is not None:
            version = await models.find_export(spec.export_job_id)
        else:
            version = await models.find(await asyncio.to_thread(_reference, spec, context.owner_id))
        require_validated(version, spec.force)
        if version.passed is not True:
            context.log(f"{version.reference} is deployed by force: {_validation_summary(version)}", "WARNING")

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


def _validation_summary(version: Version) -> str:
    if version.passed is None:
        return "it was never validated."
    return f"it did not pass its validation: {'; '.join(version.reasons) or 'its report says why'}."


def _load_on_engine(context: Context, reference: str) -> None:
    """Load a version in every replica of the engine, beside the models that it has loaded."""
    if not get_settings().engines.replicas:
        context.log("No engine is configured (engines.replicas is 0), so none loads it.")
        return
    from ray import serve as ray_serve
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import RayServeException

    try:
        engine: Any = ray_serve.get_deployment_handle(ENGINE_DEPLOYMENT, app_name=SERVE_APPLICATION)
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
