"""The change of the sealing key."""

from cluster import audit_log, secrets
from cluster.db import Database
from cluster.ownership import LOCAL
from cluster.sealing.columns import SealedSecret, find_unreadable, seal_again


async def rotate_sealing_key(database: Database) -> tuple[int, list[SealedSecret]]:
    """Make a new key, and seal all secrets with it. Nothing else of this installation may run meanwhile.

    Returns the number of secrets, and those that no key opens. A crash leaves all others readable: both keys are
    accepted until everything is sealed with the new one. Then the next call continues with the same new key.
    """
    secrets.new_sealing_key()
    async with database.transaction() as session:
        count, unreadable = await seal_again(session), await find_unreadable(session)
        audit_log.record(session, "keys.rotate", LOCAL, "sealing", secrets=count, unreadable=len(unreadable))
    secrets.forget_old_sealing_key()
    return count, unreadable
