"""The routes /api/v1/mcp: list the tools of services, call them, and list the recorded calls."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select

from cluster.db import get_database
from cluster.services.errors import ServiceError
from cluster.services.tool_source import find_tool_source
from cluster.services.tools import tool_parameters
from cluster.times import UtcTime
from cluster.tools import Effect, Tool, ToolContext, ToolSource
from pipelines.tools import calls as tool_calls
from pipelines.tools.calls import ToolCall, ToolCallOutcome
from serve.http.pagination import Page, PaginationParams
from serve.security.callers import AdminCaller, CurrentCaller

router = APIRouter(prefix="/api/v1/mcp")

ServerName = Annotated[str, Path(max_length=100, description="Type or name of a service.", examples=["sabnzbd"])]


class ToolView(BaseModel):
    name: str
    description: str
    effect: Effect = Field(description="All effects but read are for administrators.")
    parameters: dict[str, dict[str, Any]] = Field(
        description="By name: `type`, `description`, `default` or `required`, and limits.",
        examples=[{"limit": {"type": "integer", "description": "Maximum items to return", "default": 50}}],
    )


class ToolList(BaseModel):
    server: str
    tools: list[ToolView]


class CallRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    tool: str = Field(min_length=1, max_length=200, examples=["get_queue"])
    arguments: dict[str, Any] = Field(default={}, examples=[{}])


class CallResult(BaseModel):
    result: Any
    execution_time_ms: float


class CallView(BaseModel):
    id: int
    at: UtcTime
    called_by: str
    service: str
    tool: str
    arguments: dict[str, Any] = Field(description="Without secrets.")
    outcome: ToolCallOutcome = Field(description="running long after `at`: the server stopped during the call.")
    error_code: str | None
    error: str | None
    execution_time_ms: float | None


@router.get("/calls")
async def list_calls(
    caller: AdminCaller,
    paging: PaginationParams,
    service: Annotated[str | None, Query(max_length=100, description="Name of the service.")] = None,
) -> Page[CallView]:
    """List the recorded calls of tools, the newest first."""
    query = select(ToolCall) if service is None else select(ToolCall).where(ToolCall.service == service)
    async with get_database().read_transaction() as session:
        rows = await paging.read(session, query.order_by(ToolCall.id.desc()))
        return paging.page([CallView.model_validate(row, from_attributes=True) for row in rows.items], rows.total)


@router.get("/{server}/tools")
async def list_tools(server: ServerName, caller: CurrentCaller) -> ToolList:
    source = await _find_source(server)
    return ToolList(server=server, tools=[_view(tool) for tool in source.tools])


@router.post("/{server}/call")
async def call_tool(server: ServerName, body: CallRequest, caller: CurrentCaller) -> CallResult:
    """Call a tool. Only administrators may call tools that change something. Every call is recorded."""
    try:
        source = await _find_source(server)
        call_result = await tool_calls.call(get_database(), source, body.tool, body.arguments, caller)
    except ServiceError as error:
        if error.is_failure:
            error.error = "mcp_connection_error"
        raise
    return CallResult(result=call_result.result, execution_time_ms=call_result.execution_time_ms)


async def _find_source(server: str) -> ToolSource:
    async with get_database().read_transaction() as session:
        return await find_tool_source(session, server)


def _view(tool: Tool[ToolContext]) -> ToolView:
    return ToolView(name=tool.name, description=tool.description, effect=tool.effect, parameters=tool_parameters(tool))
