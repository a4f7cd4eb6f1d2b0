"""The gateway's training sessions: a wish to train that is kept before, and beside, the job that fulfils it."""

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
from pipelines.training.data.resolution import SHIPPED
from pipelines.training.spec import Data, FineTuneSpec

NOT_CONFIGURED = {"name", "base_model", "data", "labels"}
"""What of a spec a session says in other words."""


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
    owner_id: Mapped[str | None] = mapped_column(String(36), index=True)  # None: this machine's own
    created_by: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(default=now)
    updated_at: Mapped[datetime] = mapped_column(default=now, onupdate=now)


def config_schema(ref_template: str) -> dict[str, Any]:
    fields: dict[str, Any] = FineTuneSpec.model_json_schema(ref_template=ref_template)["properties"]
    own = {name: field for name, field in fields.items() if name not in NOT_CONFIGURED}
    return {"type": "object", "properties": {"num_epochs": own["epochs"], **own}, "additionalProperties": False}


def check(name: str, base_model: str, config: dict[str, Any]) -> None:
    """Refuse what could not be started, whatever it is started with."""
    wanted = spec(name, base_model, config, Data(dataset=SHIPPED), {})
    find_kind("fine_tune").check(wanted.model_dump(mode="json"))


def spec(name: str, base_model: str, config: dict[str, Any], data: Data, labels: dict[str, str]) -> FineTuneSpec:
    """A session's words as the spec that everybody uses."""
    said = dict(config)
    if twice := NOT_CONFIGURED & said.keys():
        raise _unfit({f"config.{min(twice)}": "does not belong here"})
    if {"num_epochs", "epochs"} <= said.keys():
        raise _unfit({"config.epochs": "is said twice, as num_epochs too"})
    epochs = "num_epochs" if "num_epochs" in said else "epochs"
    if epochs in said:
        said["epochs"] = said.pop(epochs)
    room = 100 - len(f"-{said.get('suffix') or ''}")
    slug = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[: max(room, 1)] or "session"
    about = {"name": slug, "base_model": base_model, "data": data, "labels": labels}
    try:
        return FineTuneSpec.model_validate(said | about, strict=True)
    except ValidationError as error:
        faults: dict[str, str] = {}
        for fault in error.errors(include_url=False):
            # Where there are several types to choose from, each of them says why it is not meant.
            field = epochs if fault["loc"][:1] == ("epochs",) else ".".join(str(part) for part in fault["loc"][:1])
            place = f"config.{field}".rstrip(".") if field not in about else field
            reason = fault["msg"].removeprefix("Value error, ")
            faults[place] = f"{faults[place]}; or: {reason}" if place in faults else reason
        raise _unfit(faults) from None


def _unfit(faults: dict[str, str]) -> UnprocessableRequest:
    field, fault = next(iter(faults.items()))
    return UnprocessableRequest(f"The session is not valid: {field}: {fault}.", details=faults)
