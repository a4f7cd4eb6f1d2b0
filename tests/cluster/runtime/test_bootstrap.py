"""What a start does to the database."""

import pytest
from sqlalchemy import select

from cluster.audit_log import AuditLogEntry
from cluster.db import Database
from cluster.runtime import bootstrap
from cluster.settings import get_settings


async def test_each_start_records_the_settings_that_are_not_defaults(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGEARR_AUTH__SIGNING_KEY", "s" * 40)
    monkeypatch.setenv("FORGEARR_SERVE__PORT", "8123")
    monkeypatch.setenv("FORGEARR_MLFLOW__TRACKING_URI", "https://ann:hunter2@mlflow.example")
    for required in ("false", "true"):
        monkeypatch.setenv("FORGEARR_AUTH__REQUIRED", required)
        get_settings.cache_clear()
        if required == "true":
            with pytest.raises(bootstrap.NoAdmin):
                await prepare()
        else:
            await prepare()
    async with database.read_transaction() as session:
        applied, refused = await session.scalars(select(AuditLogEntry).order_by(AuditLogEntry.id))
    assert (applied.action, applied.outcome, applied.actor) == ("settings.apply", "succeeded", "local")
    assert (refused.action, refused.outcome) == ("settings.apply", "refused")
    assert applied.details
    assert applied.details["serve.port"] == "8123"
    assert "serve.host" not in applied.details
    assert "hunter2" not in str(applied.details)
    assert "ssss" not in str(applied.details)


async def prepare() -> None:
    await bootstrap._prepare_database(get_settings(), lambda step, detail: None)  # pyright: ignore[reportPrivateUsage]
