"""Served models for all APIs: their names, the newest one, and the deletion of a model by its name."""

from contextlib import suppress

from fastapi import Request

from cluster.errors import InvalidRequest, Unavailable
from cluster.ownership import Principal
from pipelines.training.models import deletion as model_deletion
from pipelines.training.models.versions import Version
from serve.engines.protocol import ModelFolder
from serve.models import fine_tuned_names
from serve.models.dependencies import get_engine, get_models


class NotRegistered(InvalidRequest):
    """This model is not in the registry."""

    code = "NOT_REGISTERED"


async def active_model(request: Request, caller: Principal) -> str | None:
    """The newest served model; None if there is none, or if the registry does not respond."""
    try:
        return newest_name(await served_versions(request, caller))
    except Unavailable:
        return None


async def delete_and_unload(request: Request, reference: str, caller: Principal) -> None:
    """Delete a model or a version, and unload it after its last request."""
    if reference.startswith(fine_tuned_names.PREFIX):
        resolved = await get_models(request).resolve(reference, caller)
        if isinstance(resolved.source, ModelFolder):
            raise NotRegistered(f"'{reference}' was never exported, so there is no model to delete.")
        reference = resolved.reference
    deleted = await model_deletion.remove(reference, caller)
    get_models(request).clear_cache()
    for version in deleted:
        with suppress(Unavailable):  # an unreachable engine unloads it when the memory is needed
            await get_engine(request).unload(version.reference, version)


async def served_versions(request: Request, caller: Principal) -> list[Version]:
    models = await get_models(request).list_registered(caller)
    return [model.served for model in models if model.served is not None]


def newest_name(served: list[Version]) -> str | None:
    newest = max(served, key=lambda version: version.created_at, default=None)
    return latest_name(newest) if newest else None


def latest_name(version: Version) -> str:
    return f"{version.name}:latest"
