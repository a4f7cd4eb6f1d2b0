"""How long a model stays loaded after a request."""

import logging

from cluster.errors import ForgearrError
from cluster.times import parse_duration
from serve.engines.protocol import Engine
from serve.models.resolver import ResolvedModel

log = logging.getLogger(__name__)


async def apply_keep_alive(engine: Engine, model: ResolvedModel, keep_alive: float | str | None) -> None:
    """Let a model that has answered stay as long as its client says. The answer is there, whatever comes of it."""
    if keep_alive is None:
        return
    try:
        await engine.set_keep_alive(model.reference, parse_duration(keep_alive), model.source)
    except ForgearrError as error:
        log.warning("%s may not stay as long as somebody has said: %s", model.reference, error.message)
