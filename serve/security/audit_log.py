"""The route /api/v1/audit-log: who did what, for administrators. Nothing can be changed there."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import select

from cluster.audit_log import Action, AuditLogEntry, Outcome
from cluster.db import get_database
from cluster.times import RequestTime, UtcTime
from serve.http.pagination import CursorPage, cursor_page, keyset_slice
from serve.security.callers import AdminCaller

router = APIRouter(prefix="/api/v1/audit-log")

Name = Annotated[Annotated[str, Field(min_length=1, max_length=400)] | SkipJsonSchema[None], Query()]
EntryId = Annotated[Annotated[str, Field(pattern=r"^\d{1,18}$")] | SkipJsonSchema[None], Query()]


class AuditLogView(BaseModel):
    id: str
    created_at: UtcTime
    action: Action
    outcome: Outcome
    actor: str | None = Field(description="The name of whoever did it. Null: nobody had logged in.")
    actor_id: str | None = Field(description="Their account. Null: the platform, the user of this machine, or nobody.")
    address: str | None = Field(description="The client's address. Null: no request, but a command or a job.")
    target: str | None = Field(description="The email, name or id of what it was about.")
    details: dict[str, Any] | None
    request_id: str | None


@router.get("")
async def list_entries(
    caller: AdminCaller,
    after: EntryId = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 100,
    action: Action | None = None,
    outcome: Outcome | None = None,
    actor: Name = None,
    target: Name = None,
    created_after: RequestTime | None = None,
    created_before: RequestTime | None = None,
) -> CursorPage[AuditLogView]:
    """List the entries of the audit log, the newest first."""
    query = select(AuditLogEntry)
    columns = {
        AuditLogEntry.action: action,
        AuditLogEntry.outcome: outcome,
        AuditLogEntry.actor: actor,
        AuditLogEntry.target: target,
    }
    for column, value in columns.items():
        if value is not None:
            query = query.where(column == value)
    if created_after:
        query = query.where(AuditLogEntry.created_at >= created_after)
    if created_before:
        query = query.where(AuditLogEntry.created_at < created_before)
    after_key = None if after is None else (int(after),)
    async with get_database().read_transaction() as session:
        entries = await keyset_slice(session, query, (AuditLogEntry.id,), after_key, limit)
    return cursor_page([_view(entry) for entry in entries.items], entries.has_more)


def _view(entry: AuditLogEntry) -> AuditLogView:
    fields = {name: getattr(entry, name) for name in AuditLogView.model_fields}
    return AuditLogView.model_validate(fields | {"id": str(entry.id)})
