"""What one account may use at most: the settings `limits.account_…`.

The code that stores something declares how its use is measured, under the name of its setting. The limits are for
users: administrators and the platform itself have none.
"""

import math
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import advisory_lock
from cluster.errors import Forbidden
from cluster.ownership import Principal
from cluster.settings import get_settings

Measure = Callable[[AsyncSession, Collection[str]], Awaitable[Mapping[str, int]]]
"""Returns what these accounts use, by their ids: numbers of things, or bytes. One that uses nothing may be missing."""
Function = TypeVar("Function", bound=Measure)


MB = 1024 * 1024


class AccountLimitReached(Forbidden):
    """Your account has as much as one account may have."""

    code = "ACCOUNT_LIMIT_REACHED"


@dataclass(frozen=True)
class _Resource:
    measure: Measure
    noun: str
    remedy: str
    unit: int


_resources: dict[str, _Resource] = {}


def measures(name: str, noun: str, remedy: str, unit: int = 1) -> Callable[[Function], Function]:
    """Decorator: declare what measures the use of `limits.account_NAME`.

    `noun` names what is used in messages, and `remedy` says how an account gets below its limit again. `unit` is what
    the limit counts: MB, if the measure is in bytes.
    """

    def declare(measure: Function) -> Function:
        _resources[name] = _Resource(measure, noun, remedy, unit)
        return measure

    return declare


async def require_room(session: AsyncSession, principal: Principal, name: str, amount: int = 1) -> None:
    """Raise AccountLimitReached if the account may not use this much more.

    Call it before the use is added, in the same transaction: others of the same account wait here for its end.
    """
    if _is_limited(principal, name):
        await advisory_lock(session, f"account {principal.id} {name}")
        await _require(session, principal, name, amount)


async def require_any_room(session: AsyncSession, principal: Principal, name: str) -> None:
    """Raise AccountLimitReached if the account uses all that it may, before work whose size nobody knows yet."""
    if _is_limited(principal, name):
        await _require(session, principal, name, 1)


def limit_of(name: str) -> int | None:
    """The limit of a user's account. None: there is none."""
    return getattr(get_settings().limits, f"account_{name}")


async def read_usage(session: AsyncSession, account_ids: Collection[str]) -> dict[str, dict[str, int]]:
    """What each of these accounts uses, by account and resource, in the units of their limits."""
    usage: dict[str, dict[str, int]] = {account: {} for account in account_ids}
    for name, resource in sorted(_resources.items()):
        used = await resource.measure(session, account_ids)
        for account in account_ids:
            usage[account][name] = math.ceil(used.get(account, 0) / resource.unit)
    return usage


def _is_limited(principal: Principal, name: str) -> bool:
    return limit_of(name) is not None and not principal.is_admin and principal.id is not None


async def _require(session: AsyncSession, principal: Principal, name: str, amount: int) -> None:
    resource, limit, account = _resources[name], limit_of(name), principal.id
    assert limit is not None
    assert account is not None
    used = (await resource.measure(session, [account])).get(account, 0)
    if used + amount <= limit * resource.unit:
        return
    shown, more = math.ceil(used / resource.unit), math.ceil(amount / resource.unit)
    needs = f" This needs {more} more." if more > 1 else ""
    raise AccountLimitReached(
        f"Your account has {shown} {resource.noun}, and may have {limit}.{needs} {resource.remedy}",
        details={"resource": name, "used": shown, "limit": limit},
    )
