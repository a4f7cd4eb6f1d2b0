"""Wake the dispatcher after a commit."""

from sqlalchemy.ext.asyncio import AsyncSession

from cluster import actors
from cluster.db import after_commit
from cluster.errors import Unavailable

DISPATCHER = "dispatcher"


def wake_dispatcher_on_commit(session: AsyncSession) -> None:
    """When this transaction has committed, tell the dispatcher that there may be something to do."""
    if wake_dispatcher not in session.info.get("after_commit", []):
        after_commit(session, wake_dispatcher)


def wake_dispatcher() -> None:
    notify_dispatcher("wake")


def notify_dispatcher(method: str, *arguments: object) -> None:
    """Send word and do not wait: what the message says is in the database, where the dispatcher looks by itself too."""
    try:
        getattr(actors.find_actor(DISPATCHER), method).remote(*arguments)
    except Unavailable:
        return
