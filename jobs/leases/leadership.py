"""The leadership: only one dispatcher acts at a time."""

import secrets
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import now
from cluster.errors import ForgearrError
from jobs.leases.watch import LeaseWatch
from jobs.tables import Leadership

ROW_LOCK: Any = {"key_share": True}


class LeadershipLost(ForgearrError):
    """Another dispatcher has taken over this database."""

    code = "LEADERSHIP_LOST"


async def take_leadership(
    session: AsyncSession, holder: str, watch: LeaseWatch, predecessor: str | None = None
) -> str | None:
    """Take the leadership, and return its token. None: another holder has it.

    The holder itself need not wait for its expiry, nor need the process that replaces a dead `predecessor`.
    """
    token = secrets.token_hex(8)
    leader = await session.get(Leadership, 1, with_for_update=ROW_LOCK)
    if leader is None:
        session.add(Leadership(id=1, holder=holder, token=token, heartbeats=0, waiting={}))
        return token
    is_expired = leader.token in watch.find_expired({leader.token: leader.heartbeats})
    if leader.holder not in {holder, predecessor} and not is_expired:
        return None
    leader.holder, leader.token, leader.heartbeats, leader.renewed_at = holder, token, 0, now()
    return token


async def renew_leadership(session: AsyncSession, token: str) -> None:
    leader = await require_leadership(session, token)
    leader.heartbeats += 1
    leader.renewed_at = now()


async def require_leadership(session: AsyncSession, token: str) -> Leadership:
    """Return the row, locked: nobody else can take over before this transaction ends."""
    leader = await session.get(Leadership, 1, with_for_update=ROW_LOCK)
    if leader is None or leader.token != token:
        raise LeadershipLost()
    return leader
