"""The leadership: only one dispatcher acts at a time."""

import secrets

from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import now
from cluster.errors import ForgearrError
from jobs.leases.claim import new_lease_expiry
from jobs.tables import Leadership


class LeadershipLost(ForgearrError):
    """Another dispatcher has taken over this database."""

    code = "LEADERSHIP_LOST"


async def take_leadership(session: AsyncSession, holder: str) -> str | None:
    """Take the leadership, and return its token. None: another holder has it. The same holder may replace itself."""
    token = secrets.token_hex(8)
    leader = await session.get(Leadership, 1, with_for_update=True)
    if leader is None:
        session.add(Leadership(id=1, holder=holder, token=token, expires_at=new_lease_expiry(), waiting={}))
        return token
    if leader.holder != holder and leader.expires_at > now():
        return None
    leader.holder, leader.token, leader.expires_at = holder, token, new_lease_expiry()
    return token


async def renew_leadership(session: AsyncSession, token: str) -> None:
    leader = await require_leadership(session, token)
    leader.expires_at = new_lease_expiry()


async def require_leadership(session: AsyncSession, token: str) -> Leadership:
    leader = await session.get(Leadership, 1)
    if leader is None or leader.token != token:
        raise LeadershipLost()
    return leader
