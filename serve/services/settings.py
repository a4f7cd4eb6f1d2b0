"""The routes /api/v1/settings: an overview of the services, the served model and the scheduled audits."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import get_database
from cluster.errors import InvalidRequest
from cluster.ownership import Principal
from cluster.services import health_checks
from cluster.services import store as service_store
from cluster.services.store import ServiceNotFound
from pipelines.media.audit import schedule as audit_schedule
from pipelines.media.check_services import enqueue_check
from serve.models.names import active_model
from serve.security.callers import AdminCaller, CurrentCaller
from serve.services.routes import Url

router = APIRouter(prefix="/api/v1/settings")

Hours = Literal[1, 2, 3, 4, 6, 8, 12, 24, 168]


class NothingToChange(InvalidRequest):
    """The request changes nothing: send mcp_servers, audit or both."""


class ServerSettings(BaseModel):
    enabled: bool
    url: str
    connected: bool | None = Field(description="Result of the last check. Null: not checked since its last change.")


class LlmSettings(BaseModel):
    provider: Literal["forgearr"] = "forgearr"
    model: str | None = Field(description="The newest served model. Null: none.")


class AuditSettings(BaseModel):
    auto_audit_enabled: bool
    auto_audit_interval_hours: int | None = Field(description="Null: the schedule `auto-audit` has another cron line.")


class SettingsView(BaseModel):
    mcp_servers: dict[str, ServerSettings] = Field(description="The services by handle.")
    llm: LlmSettings
    audit: AuditSettings


class PartialUpdate(BaseModel):
    """Fields that are not sent stay unchanged. No field can be null."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def refuse_null(cls, value: object) -> object:
        if value is None:
            raise ValueError("cannot be null")
        return value


class ServerChanges(PartialUpdate):
    enabled: bool | SkipJsonSchema[None] = None
    url: Url | SkipJsonSchema[None] = None


class AuditChanges(PartialUpdate):
    auto_audit_enabled: bool | SkipJsonSchema[None] = None
    auto_audit_interval_hours: Hours | SkipJsonSchema[None] = None


class SettingsChanges(PartialUpdate):
    mcp_servers: dict[Annotated[str, Field(min_length=1, max_length=100)], ServerChanges] | SkipJsonSchema[None] = None
    audit: AuditChanges | SkipJsonSchema[None] = None


class SettingsChanged(BaseModel):
    success: Literal[True] = True
    message: str
    updated_settings: dict[str, Any]


@router.get("")
async def show_settings(caller: CurrentCaller, request: Request) -> SettingsView:
    async with get_database().read_transaction() as session:
        outcomes = await health_checks.last_checks(session)
        handles = service_store.handles(await service_store.list_services(session))
        enabled, hours = await audit_schedule.state(session)
    servers = {
        handle: ServerSettings(
            enabled=service.enabled,
            url=service.url,
            connected=outcomes[service.id].healthy if service.id in outcomes else None,
        )
        for handle, service in sorted(handles.items())
    }
    return SettingsView(
        mcp_servers=servers,
        llm=LlmSettings(model=await active_model(request, caller)),
        audit=AuditSettings(auto_audit_enabled=enabled, auto_audit_interval_hours=hours),
    )


@router.put("")
async def change_settings(body: SettingsChanges, caller: AdminCaller) -> SettingsChanged:
    """Change the fields that are sent. If one change fails, none is made."""
    updates = body.model_dump(exclude_unset=True)
    if not updates:
        raise NothingToChange
    async with get_database().transaction() as session:
        for name, changes in updates.get("mcp_servers", {}).items():
            await _change_server(session, name, changes, caller)
        if body.audit is not None and updates["audit"]:
            audit_changes = body.audit.auto_audit_enabled, body.audit.auto_audit_interval_hours
            await audit_schedule.change(session, *audit_changes)
    return SettingsChanged(message="Settings updated successfully", updated_settings=updates)


async def _change_server(session: AsyncSession, name: str, changes: dict[str, Any], caller: Principal) -> None:
    found = await service_store.find(session, name)
    if found is None:
        raise ServiceNotFound(f"There is no service of type '{name}'. Add one at /api/services.")
    service = await service_store.get(session, found.id, lock=True)
    previous_state = service.connected_as_of, service.enabled
    await service_store.change(session, service, changes)
    if service.enabled and (service.connected_as_of, service.enabled) != previous_state:
        await enqueue_check(session, service.id, caller)
