"""Settings of the servers that are watched."""

from typing import Annotated, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from cluster.settings.base import Section

ServerName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,59}$")]
RESERVED_NAMES = frozenset({"overview", "summary", "last_updated", "total_servers", "online_servers", "alerts_count"})
"""Paths beside those of servers, and fields beside them in the overview."""
MountPoint = Annotated[str, StringConstraints(pattern=r"^/", max_length=4096)]


class DeclaredServer(Section):
    """A server in `servers.declared`: one machine, and who knows something of it."""

    this_machine: bool = False
    services: list[str] = Field(default_factory=list[str])
    file_systems: list[MountPoint] = Field(default_factory=list[MountPoint])

    @model_validator(mode="after")
    def require_source(self) -> Self:
        if not self.this_machine and not self.services:
            raise ValueError("has no source: set this_machine, or name services")
        if self.file_systems and not self.this_machine:
            raise ValueError("file_systems are those of this_machine")
        return self


class ServerSettings(Section):
    declared: dict[ServerName, DeclaredServer] = Field(
        description="The servers by name: ai_server, app_server, storage_server or any other. Each has sources that "
        "complete each other: this_machine (the one that Forgearr runs on), services (names of connected services, "
        "such as a Proxmox or a Qdrant) and file_systems (mount points of this machine). Empty: this machine is the "
        "ai_server."
    )
    period_seconds: float = Field(ge=0.5, le=60, description="How often each of them is measured.")

    @field_validator("declared")
    @classmethod
    def refuse_reserved_names(cls, declared: dict[str, DeclaredServer]) -> dict[str, DeclaredServer]:
        if reserved := RESERVED_NAMES & declared.keys():
            raise ValueError(f"no server may be named {min(reserved)}")
        return declared
