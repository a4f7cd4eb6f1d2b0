"""What one account may use at most: the settings `limits.account_…`.

The code that stores something declares how its use is measured, under the name of its setting. The limits are for
users: administrators and the platform itself have none.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import advisory_lock
from cluster.errors import Forbidden
from cluster.ownership import Principal
from cluster.settings import get_settings

Measure = Callable[[AsyncSession, Collection[str]], Awaitable[Mapping[str, int]]]
"""Returns what these accounts use, by their ids. An account that uses nothing may be missing."""
Function = TypeVar("Function", bound=Measure)


class AccountLimitReached(Forbidden):
    """Your account has as much as one account may have."""

    code = "ACCOUNT_LIMIT_REACHED"


@dataclass(frozen=True)
class _Resource:
    measure: Measure
    noun: str
    remedy: str


_resources: dict[str, _Resource] = {}


def measures(name: str, noun: str, remedy: str) -> Callable[[Function], Function]:
    """Decorator: declare what measures the use of `limits.account_NAME`.

    `noun` names what is used in messages, and `remedy` says how an account gets below its limit again.
    """

    def declare(measure: Function) -> Function:
        _resources[name] = _Resource(measure, noun, remedy)
        return measure

    return declare


async def require_room(session: AsyncSession, principal: Principal, name: str, amount: int = 1) -> None:
    """Raise AccountLimitReached if the account may not use this much more.

    Call it before the use is added, in the same transaction: others of the same account wait here for its end.
    """
    limit = limit_of(name)
    if limit is None or principal.is_admin or principal.id is None:
        return
    await advisory_lock(session, f"account {principal.id} {name}")
    resource = _resources[name]
    used = (await resource.measure(session, [principal.id])).get(principal.id, 0)
    if used + amount > limit:
        raise AccountLimitReached(
            f"Your account has {used} {resource.noun}, and may have {limit}. {resource.remedy}",
            details={"resource": name, "used": used, "limit": limit},
        )


def limit_of(name: str) -> int | None:
    """The limit of a user's account. None: there is none."""
    return getattr(get_settings().limits, f"account_{name}")


async def read_usage(session: AsyncSession, account_ids: Collection[str]) -> dict[str, dict[str, int]]:
    """What each of these accounts uses, by account and resource."""
    measured = {name: await resource.measure(session, account_ids) for name, resource in sorted(_resources.items())}
    return {account: {name: used.get(account, 0) for name, used in measured.items()} for account in account_ids}
