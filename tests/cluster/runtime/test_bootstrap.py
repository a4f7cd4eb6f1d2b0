"""What a start does to the database."""

from pathlib import Path

import pytest
from sqlalchemy import select

from cluster import secrets
from cluster.audit_log import AuditLogEntry
from cluster.db import Database
from cluster.runtime import bootstrap
from cluster.services import store as service_store
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


async def test_a_start_warns_of_secrets_that_cannot_be_opened(
    database: Database, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with database.transaction() as session:
        for name in ("TV", "Radio"):
            service = {"name": name, "type": "sonarr", "url": "http://127.0.0.1:9", "api_key": "key"}
            await service_store.create(session, service, "test")
    assert [step for step, _ in await prepare()] == ["database"]
    secrets.new_sealing_key()
    assert ("warning", "an old sealing key is accepted too: `forgearr keys rotate` ends that") in await prepare()
    secrets.forget_old_sealing_key()
    warning = "2 stored secrets cannot be opened with the sealing key: `forgearr keys check` lists them"
    assert ("warning", warning) in await prepare()
    assert "the key of the service 'TV' cannot be opened: enter it again with PUT /api/services/1" in caplog.text


async def prepare() -> list[tuple[str, str]]:
    """The steps that it reports."""
    steps: list[tuple[str, str]] = []

    def add(step: str, detail: str) -> None:
        steps.append((step, detail))

    await bootstrap._prepare_database(get_settings(), add)  # pyright: ignore[reportPrivateUsage]
    return steps
