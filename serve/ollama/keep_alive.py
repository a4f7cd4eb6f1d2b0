"""Applies the field `keep_alive` of a request: how long its model stays in memory afterwards.

For a model that others use too, only an administrator decides that. Ollama's clients send the field with every request,
so for everybody else it has no effect there.
"""

import logging

from cluster.errors import Forbidden, ForgearrError
from cluster.ownership import Principal
from cluster.times import parse_duration
from pipelines.training.models.versions import Version
from serve.engines.protocol import Engine, ModelFolder
from serve.models.resolver import ResolvedModel

log = logging.getLogger(__name__)


class UnloadForbidden(Forbidden):
    """Only an administrator may unload a model that others use too."""

    code = "UNLOAD_FORBIDDEN"


def require_own(model: ResolvedModel, caller: Principal) -> None:
    if not _is_own(model, caller):
        raise UnloadForbidden(f"Only an administrator may unload {model.reference}, because others use it too.")


async def set_keep_alive(
    engine: Engine, model: ResolvedModel, keep_alive: float | str | None, caller: Principal
) -> None:
    if keep_alive is not None and _is_own(model, caller):
        await engine.set_keep_alive(model.reference, parse_duration(keep_alive), model.source)


async def apply_keep_alive(
    engine: Engine, model: ResolvedModel, keep_alive: float | str | None, caller: Principal
) -> None:
    """Set how long the model stays in memory. The request has succeeded already, so an error is only logged."""
    try:
        await set_keep_alive(engine, model, keep_alive, caller)
    except ForgearrError as error:
        log.warning("keep_alive of %s could not be set: %s", model.reference, error.message)


def _is_own(model: ResolvedModel, caller: Principal) -> bool:
    """Whether nobody else but administrators can use this model, or the caller is one. An adapter shares its base."""
    source = model.source
    if caller.is_admin:
        return True
    if isinstance(source, ModelFolder):
        return source.address is not None  # a training's, which only its owner can name
    return isinstance(source, Version) and source.visibility == "private" and not source.is_adapter
