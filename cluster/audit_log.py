"""The audit log: who did what, when, from where, and with which outcome. It is for administrators.

An entry is written in the transaction of what it is about, so that there is neither without the other. Nothing changes
an entry, and only the sweep deletes it, after `logs.audit_log_days`. The audits of the settings of services
(pipelines/media/audit) are another subject.
"""

import json
import logging
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import Index, String, delete
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from cluster.db import Base, Database, Document, Sequence, after_commit, delete_rows, get_database, now
from cluster.logs import request_address, request_id
from cluster.ownership import Principal
from cluster.settings import get_settings

Action = Literal[
    "account.create",
    "account.disable",
    "account.enable",
    "backup.create",
    "dataset.delete",
    "file.delete",
    "key.create",
    "key.revoke",
    "keys.rotate",
    "login",
    "logout",
    "model.delete",
    "model.deploy",
    "model.retire",
    "model.rollback",
    "movie.delete",
    "password.change",
    "refresh",
    "repository.delete",
    "series.delete",
    "service.delete",
    "settings.apply",
]
Outcome = Literal["succeeded", "refused", "failed"]

MAX_TARGET_LENGTH = 400

logger = logging.getLogger(__name__)


class AuditLogEntry(Base):
    __tablename__ = "audit_log"
    __table_args__ = (
        Index("ix_audit_log_action_id", "action", "id"),
        Index("ix_audit_log_actor_id_id", "actor_id", "id"),
    )

    id: Mapped[int] = mapped_column(Sequence, primary_key=True)
    created_at: Mapped[datetime] = mapped_column(default=now, index=True)
    action: Mapped[Action] = mapped_column(String(40))
    outcome: Mapped[Outcome] = mapped_column(String(10))
    actor_id: Mapped[str | None] = mapped_column(String(36))  # the account; None: the platform, this machine, nobody
    actor: Mapped[str | None] = mapped_column(String(200))  # its name; None: nobody had logged in
    address: Mapped[str | None] = mapped_column(String(64))  # of the client; None: a command or a job
    target: Mapped[str | None] = mapped_column(String(MAX_TARGET_LENGTH))  # the email, name or id of what it was about
    details: Mapped[Any | None] = mapped_column(Document)
    request_id: Mapped[str | None] = mapped_column(String(128))


def record(
    session: AsyncSession,
    action: Action,
    principal: Principal | None,
    target: str | None = None,
    *,
    outcome: Outcome = "succeeded",
    **details: Any,
) -> None:
    """Record what this transaction does. A line with the same fields goes to the log once it has committed."""
    fields: dict[str, Any] = {
        "action": action,
        "outcome": outcome,
        "actor_id": principal.id if principal else None,
        "actor": principal.name if principal else None,
        "address": request_address.get(),
        "target": target[:MAX_TARGET_LENGTH] if target else None,
        "details": details or None,
    }
    session.add(AuditLogEntry(**fields, request_id=request_id.get()))
    line = " ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in fields.items())
    after_commit(session, lambda: logger.info("%s", line))


async def record_alone(
    action: Action,
    principal: Principal | None,
    target: str | None = None,
    *,
    outcome: Outcome = "succeeded",
    **details: Any,
) -> None:
    """Record, in a transaction of its own, what was done outside the database or was refused."""
    async with get_database().transaction() as session:
        record(session, action, principal, target, outcome=outcome, **details)


async def remove_old(database: Database) -> int:
    """Delete the entries that are older than `logs.audit_log_days`, and return their number."""
    oldest = now() - timedelta(days=get_settings().logs.audit_log_days)
    async with database.transaction() as session:
        return await delete_rows(session, delete(AuditLogEntry).where(AuditLogEntry.created_at < oldest))
