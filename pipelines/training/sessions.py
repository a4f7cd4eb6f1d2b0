"""Training sessions: stored configurations of a training, and their conversion to the spec of its job."""

import re
from datetime import datetime
from typing import Any
from uuid import uuid4

from pydantic import ValidationError
from sqlalchemy import ForeignKey, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from cluster.db import Base, Document, now
from cluster.errors import UnprocessableRequest
from jobs.registry import find_kind
from jobs.retention import keep_jobs_in
from pipelines.training.data.resolution import DEMO_DATASET
from pipelines.training.spec import DataSource, FineTuneSpec

RESERVED_FIELDS = {"name", "base_model", "data", "labels"}
"""Fields of a spec that a session sets outside of its config."""


class TrainingSession(Base):
    __tablename__ = "training_sessions"

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=lambda: uuid4().hex)
    name: Mapped[str] = mapped_column(String(200))
    description: Mapped[str | None] = mapped_column(Text)
    base_model: Mapped[str] = mapped_column(String(300))
    config: Mapped[dict[str, Any]]
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"), index=True)  # None: not started
    prompt_ids: Mapped[Any | None] = mapped_column(Document)  # a list of integers
    worker_id: Mapped[int | None]
    owner_id: Mapped[str | None] = mapped_column(String(36), index=True)  # None: the local owner
    created_by: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(default=now)
    updated_at: Mapped[datetime] = mapped_column(default=now, onupdate=now)


keep_jobs_in(TrainingSession.job_id)


def config_schema(ref_template: str) -> dict[str, Any]:
    fields: dict[str, Any] = FineTuneSpec.model_json_schema(ref_template=ref_template)["properties"]
    configurable = {name: field for name, field in fields.items() if name not in RESERVED_FIELDS}
    return {
        "type": "object",
        "properties": {"num_epochs": configurable["epochs"], **configurable},
        "additionalProperties": False,
    }


def validate_config(name: str, base_model: str, config: dict[str, Any]) -> None:
    """Raise an error if no training could start with this configuration, whatever its data."""
    session_spec = build_spec(name, base_model, config, DataSource(dataset=DEMO_DATASET), {})
    find_kind("fine_tune").validate_spec(session_spec.model_dump(mode="json"))


def build_spec(
    name: str, base_model: str, config: dict[str, Any], data: DataSource, labels: dict[str, str]
) -> FineTuneSpec:
    """Convert a session to the spec of its job."""
    values = dict(config)
    if reserved := RESERVED_FIELDS & values.keys():
        raise _invalid_session({f"config.{min(reserved)}": "does not belong here"})
    if {"num_epochs", "epochs"} <= values.keys():
        raise _invalid_session({"config.epochs": "is given twice, as num_epochs too"})
    epochs_key = "num_epochs" if "num_epochs" in values else "epochs"
    if epochs_key in values:
        values["epochs"] = values.pop(epochs_key)
    max_length = 100 - len(f"-{values.get('suffix') or ''}")
    slug = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[: max(max_length, 1)] or "session"
    fixed = {"name": slug, "base_model": base_model, "data": data, "labels": labels}
    try:
        return FineTuneSpec.model_validate(values | fixed, strict=True)
    except ValidationError as error:
        errors: dict[str, str] = {}
        for item in error.errors(include_url=False):
            # A field of several possible types has an error for each of them.
            field = epochs_key if item["loc"][:1] == ("epochs",) else ".".join(str(part) for part in item["loc"][:1])
            path = f"config.{field}".rstrip(".") if field not in fixed else field
            reason = item["msg"].removeprefix("Value error, ")
            errors[path] = f"{errors[path]}; or: {reason}" if path in errors else reason
        raise _invalid_session(errors) from None


def _invalid_session(errors: dict[str, str]) -> UnprocessableRequest:
    field, reason = next(iter(errors.items()))
    return UnprocessableRequest(f"The session is not valid: {field}: {reason}.", details=errors)
