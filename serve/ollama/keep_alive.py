"""How long a model stays loaded after a request."""

import logging

from cluster.errors import ForgearrError
from cluster.times import seconds_of
from serve.engines.protocol import Engine
from serve.models.resolver import Meant

log = logging.getLogger(__name__)


async def keep(engine: Engine, meant: Meant, keep_alive: float | str | None) -> None:
    """Let a model that has answered stay as long as its client says. The answer is there, whatever comes of it."""
    if keep_alive is None:
        return
    try:
        await engine.keep(meant.reference, seconds_of(keep_alive), meant.source)
    except ForgearrError as error:
        log.warning("%s may not stay as long as somebody has said: %s", meant.reference, error.message)
