"""The route /api/v1/usage: what accounts use, and what they may use."""

from collections.abc import Collection, Mapping
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import select

from cluster.db import get_database
from cluster.errors import Unavailable
from cluster.identity import AccountNotFound, Role, User, account_limits
from pipelines.training.models import registry, storage_limit
from serve.http.pagination import CursorPage, cursor_page, keyset_slice
from serve.security.callers import CurrentCaller

router = APIRouter(prefix="/api/v1/usage")


class ResourceUsage(BaseModel):
    used: int | None = Field(description="Null: unknown, because MLflow, which has the models, does not respond.")
    limit: int | None = Field(description="What the account may use at most. Null: there is no limit.")


class AccountUsage(BaseModel):
    id: str = Field(description="Id of the account.")
    username: str
    role: Role
    usage: dict[str, ResourceUsage] = Field(
        description="By resource: unfinished jobs and batches, schedules, and the MB of files, datasets, responses "
        "and models.",
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
    models = await _model_usage(list(usage))
    views = [_view(user, usage[user.id] | {storage_limit.NAME: models.get(user.id)}) for user in users.items]
    return cursor_page(views, users.has_more)


async def _model_usage(account_ids: Collection[str]) -> dict[str, int]:
    try:
        async with registry.connect() as models:
            return await storage_limit.read_usage(get_database(), models, account_ids)
    except Unavailable:
        return {}


def _view(user: User, usage: Mapping[str, int | None]) -> AccountUsage:
    resources = {
        name: ResourceUsage(used=used, limit=None if user.role == "admin" else account_limits.limit_of(name))
        for name, used in usage.items()
    }
    return AccountUsage(id=user.id, username=user.username, role=user.role, usage=resources)
