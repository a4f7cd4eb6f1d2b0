"""The route /api/v1/usage: what accounts use, and what they may use."""

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import select

from cluster.db import get_database
from cluster.identity import AccountNotFound, Role, User, account_limits
from serve.http.pagination import CursorPage, cursor_page, keyset_slice
from serve.security.callers import CurrentCaller

router = APIRouter(prefix="/api/v1/usage")


class ResourceUsage(BaseModel):
    used: int
    limit: int | None = Field(description="What the account may use at most. Null: there is no limit.")


class AccountUsage(BaseModel):
    id: str = Field(description="Id of the account.")
    username: str
    role: Role
    usage: dict[str, ResourceUsage] = Field(
        description="By resource, such as jobs (unfinished ones), schedules and batches (unfinished ones).",
        examples=[{"jobs": {"used": 3, "limit": 50}}],
    )


@router.get("")
async def list_usage(
    caller: CurrentCaller,
    after: Annotated[Annotated[str, Field(max_length=36)] | SkipJsonSchema[None], Query()] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 100,
) -> CursorPage[AccountUsage]:
    """List what accounts use now, and their limits. Administrators see all accounts, others their own."""
    query = select(User) if caller.is_admin else select(User).where(User.id == caller.id)
    async with get_database().read_transaction() as session:
        last = await session.scalar(query.where(User.id == after)) if after is not None else None
        if after is not None and last is None:
            raise AccountNotFound(f"There is no account '{after}'.")
        after_key = last and (last.created_at, last.id)
        users = await keyset_slice(session, query, (User.created_at, User.id), after_key, limit, ascending=True)
        usage = await account_limits.read_usage(session, [user.id for user in users.items])
    return cursor_page([_view(user, usage[user.id]) for user in users.items], users.has_more)


def _view(user: User, usage: dict[str, int]) -> AccountUsage:
    resources = {
        name: ResourceUsage(used=used, limit=None if user.role == "admin" else account_limits.limit_of(name))
        for name, used in usage.items()
    }
    return AccountUsage(id=user.id, username=user.username, role=user.role, usage=resources)
