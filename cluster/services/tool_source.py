"""The tools that a connected service offers to whoever may call tools."""

from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from cluster.services import store as service_store
from cluster.services.http.client import Client
from cluster.services.selection import choose_service
from cluster.services.store import Service
from cluster.tools import Tool, ToolContext, ToolSource


async def find_tool_source(session: AsyncSession, service_name: str) -> ToolSource:
    """The tools of the enabled service of this type or name."""
    service = await choose_service(session, lambda connector: connector.tools or None, "has tools", service_name)
    return ToolSource(service.name, tuple(_with_client(service, tool) for tool in service.connector.tools))


def _with_client(service: Service, tool: Tool[Client]) -> Tool[ToolContext]:
    async def handler(context: ToolContext, arguments: Any) -> Any:
        async with service_store.open_client(context.database, service) as client:
            return await tool.handler(client, arguments)

    return Tool(tool.name, tool.description, tool.arguments, handler, tool.effect, tool.result)
