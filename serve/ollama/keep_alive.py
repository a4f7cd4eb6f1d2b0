"""Applies the field `keep_alive` of a request: how long its model stays in memory afterwards."""

import logging

from cluster.errors import ForgearrError
from cluster.times import parse_duration
from serve.engines.protocol import Engine
from serve.models.resolver import ResolvedModel

log = logging.getLogger(__name__)


async def apply_keep_alive(engine: Engine, model: ResolvedModel, keep_alive: float | str | None) -> None:
    """Set how long the model stays in memory. The request has succeeded already, so an error is only logged."""
    if keep_alive is None:
        return
    try:
        await engine.set_keep_alive(model.reference, parse_duration(keep_alive), model.source)
    except ForgearrError as error:
        log.warning("keep_alive of %s could not be set: %s", model.reference, error.message)
