"""Send messages to the dispatcher, so that it acts at once and not in its next round."""

from sqlalchemy.ext.asyncio import AsyncSession

from cluster import actors
from cluster.db import after_commit
from cluster.errors import Unavailable

DISPATCHER = "dispatcher"


def wake_dispatcher_on_commit(session: AsyncSession) -> None:
    """Wake the dispatcher once this transaction has committed."""
    if wake_dispatcher not in session.info.get("after_commit", []):
        after_commit(session, wake_dispatcher)


def wake_dispatcher() -> None:
    notify_dispatcher("wake")


def notify_dispatcher(method: str, *arguments: object) -> None:
    """Send a message without waiting. It may be lost: the facts are in the database, which the dispatcher polls."""
    try:
        getattr(actors.find_actor(DISPATCHER), method).remote(*arguments)
    except Unavailable:
        return
