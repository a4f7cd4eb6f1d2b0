"""Call the tools of services: check the arguments and the permission, run the tool, and record the call.

A call is recorded before it is made. If the process dies meanwhile, the record shows that the tool may have run.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from time import perf_counter
from typing import Any, Literal, cast

from pydantic import ValidationError
from pydantic_core import to_jsonable_python
from sqlalchemy import BigInteger, Float, Index, Integer, String, Text, delete
from sqlalchemy.orm import Mapped, mapped_column

from cluster.db import Base, Database, delete_rows, now
from cluster.errors import Forbidden, ForgearrError, InvalidRequest
from cluster.logs import MASK, SECRET_NAME, redact, strip_url_paths
from cluster.ownership import Principal
from cluster.settings import get_settings
from cluster.tools import Tool, ToolContext, ToolSource
from jobs.sweep import register_sweeper

MAX_ARGUMENTS_LENGTH = 10_000
"""In characters. Of longer arguments, only the length is stored."""

ToolCallOutcome = Literal["running", "succeeded", "failed", "refused"]


class InvalidArguments(InvalidRequest):
    """The tool does not accept these arguments."""

    code = "INVALID_TOOL_ARGUMENTS"


class ToolCall(Base):
    __tablename__ = "tool_calls"
    __table_args__ = (Index("ix_tool_calls_service_id", "service", "id"),)

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    at: Mapped[datetime] = mapped_column(index=True)
    called_by: Mapped[str] = mapped_column(String(200))
    service: Mapped[str] = mapped_column(String(100))  # its name at that time: the record outlives the service
    tool: Mapped[str] = mapped_column(String(100))
    arguments: Mapped[dict[str, Any]]  # without secrets
    outcome: Mapped[ToolCallOutcome] = mapped_column(String(10))
    error_code: Mapped[str | None] = mapped_column(String(100))
    error: Mapped[str | None] = mapped_column(Text)
    execution_time_ms: Mapped[float | None] = mapped_column(Float)  # None: it was refused, or has not ended


@dataclass(frozen=True)
class ToolCallResult:
    result: Any
    execution_time_ms: float


async def call(
    database: Database, source: ToolSource, tool_name: str, arguments: Mapping[str, Any], principal: Principal
) -> ToolCallResult:
    """Call a tool in somebody's name."""
    record = ToolCall(
        at=now(),
        called_by=principal.name,
        service=source.name,
        tool=tool_name[:100],
        arguments=_without_secrets(arguments),
        outcome="running",
    )
    try:
        tool = source.find(tool_name)
        _check_permission(tool, principal)
        validated = _validate_arguments(tool, arguments)
    except ForgearrError as error:
        await _save_record(database, record, "refused", error)
        raise
    async with database.transaction() as session:
        session.add(record)
    started = perf_counter()
    try:
        result = to_jsonable_python(await tool.handler(ToolContext(database, principal), validated))
    except ForgearrError as error:
        record.execution_time_ms = _milliseconds_since(started)
        await _save_record(database, record, "failed", error)
        raise
    execution_time = record.execution_time_ms = _milliseconds_since(started)
    await _save_record(database, record, "succeeded")
    return ToolCallResult(result, execution_time)


@register_sweeper("tool_calls")
async def remove_old_calls(database: Database) -> int:
    """Delete calls that are older than `services.history_days`."""
    async with database.transaction() as session:
        oldest = now() - timedelta(days=get_settings().services.history_days)
        return await delete_rows(session, delete(ToolCall).where(ToolCall.at < oldest))


def _check_permission(tool: Tool[ToolContext], principal: Principal) -> None:
    if tool.effect != "read" and not principal.is_admin:
        raise Forbidden(f"Only an administrator may call '{tool.name}': it changes something.")


def _validate_arguments(tool: Tool[ToolContext], arguments: Mapping[str, Any]) -> Any:
    try:
        return tool.arguments.model_validate(dict(arguments))
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        details = {".".join(map(str, problem["loc"]))[:100]: problem["msg"] for problem in problems[:20]}
        summary = "; ".join(f"{field}: {reason}" for field, reason in details.items())
        raise InvalidArguments(f"'{tool.name}' does not accept these arguments: {summary}.", details=details) from None


async def _save_record(
    database: Database, record: ToolCall, outcome: ToolCallOutcome, error: ForgearrError | None = None
) -> None:
    record.outcome = outcome
    if error:
        record.error_code, record.error = error.code, error.message
    async with database.transaction() as session:
        await session.merge(record)


def _without_secrets(arguments: Mapping[str, Any]) -> dict[str, Any]:
    try:
        length = len(json.dumps(arguments, allow_nan=False))
    except (ValueError, RecursionError):
        return {"omitted": "they cannot be stored"}
    return {"omitted": f"{length} characters"} if length > MAX_ARGUMENTS_LENGTH else _mask_secrets(dict(arguments))


def _mask_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        fields = cast(dict[str, Any], value).items()
        return {name: MASK if SECRET_NAME.search(name) else _mask_secrets(inner) for name, inner in fields}
    if isinstance(value, list):
        return [_mask_secrets(inner) for inner in cast(list[Any], value)]
    return strip_url_paths(redact(value)) if isinstance(value, str) else value


def _milliseconds_since(started: float) -> float:
    return round((perf_counter() - started) * 1000, 1)
