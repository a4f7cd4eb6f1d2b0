"""Tools: functions with described arguments that people, models and other programs may call.

Whoever calls a tool need not know who offers it. Services do (cluster/services/tool_source.py).
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from cluster.db import Database
from cluster.errors import NotFound
from cluster.ownership import Principal

Effect = Literal["read", "change", "destroy"]


class UnknownTool(NotFound):
    """There is no such tool."""

    code = "UNKNOWN_TOOL"


class Arguments(BaseModel):
    """The arguments of a tool. A tool without arguments takes this class itself."""

    model_config = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class ToolContext:
    """What a handler gets besides the arguments."""

    database: Database
    principal: Principal


Target = TypeVar("Target")
"""What a handler works on: the context of a call, or what that is turned into, such as the client of a service."""


@dataclass(frozen=True)
class Tool(Generic[Target]):
    name: str  # a verb and its object: get_queue
    description: str
    arguments: type[BaseModel]
    handler: Callable[[Target, Any], Awaitable[Any]]  # called with arguments of that type
    effect: Effect = "read"
    result: type[BaseModel] | None = None  # None: any JSON value

    @property
    def input_schema(self) -> dict[str, Any]:
        """The JSON Schema of the arguments."""
        return self.arguments.model_json_schema()

    @property
    def output_schema(self) -> dict[str, Any] | None:
        """The JSON Schema of the result, where it is known."""
        return self.result.model_json_schema(mode="serialization") if self.result else None


@dataclass(frozen=True)
class ToolSource:
    """Tools that are offered together, and have names that differ from each other."""

    name: str
    tools: tuple[Tool[ToolContext], ...]

    def find(self, tool_name: str) -> Tool[ToolContext]:
        for tool in self.tools:
            if tool.name == tool_name:
                return tool
        names = ", ".join(tool.name for tool in self.tools)
        raise UnknownTool(f"{self.name} has no tool '{tool_name[:100]}'. It has: {names}.")
