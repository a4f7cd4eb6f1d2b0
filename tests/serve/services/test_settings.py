"""/api/v1/settings: services by their handles, the default model, and scheduled audits."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select

from cluster.ownership import LOCAL
from cluster.services import store as service_store
from cluster.settings import get_settings
from jobs import schedules
from jobs.schedules import ScheduleRequest
from jobs.tables import Job, Schedule
from pipelines.media.audit.schedule import CRON_BY_HOURS
from tests.support.api_client import ApiClient

PATH = "/api/v1/settings"
UNREACHABLE = "http://127.0.0.1:9"
pytestmark = pytest.mark.usefixtures("without_mlflow")


@pytest.fixture
def without_mlflow(api: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_MLFLOW__ENABLED", "false")
    get_settings.cache_clear()


async def connect(api: ApiClient, **values: Any) -> None:
    async with api.database.transaction() as session:
        await service_store.create(session, {"name": "TV", "type": "sonarr", "url": UNREACHABLE, **values}, "ada")


async def put(api: ApiClient, **body: Any) -> Any:
    return await api.request("admin", "PUT", PATH, json=body)


async def test_settings_are_as_documented(api: ApiClient) -> None:
    await connect(api)
    await connect(api, name="4K", enabled=False)
    body = (await api.request("bob", "GET", PATH)).json()
    assert body == {
        "mcp_servers": {
            "sonarr": {"enabled": True, "url": UNREACHABLE, "connected": None},
            "4K": {"enabled": False, "url": UNREACHABLE, "connected": None},
        },
        "llm": {"provider": "forgearr", "model": None},
        "audit": {"auto_audit_enabled": False, "auto_audit_interval_hours": 24},
    }


async def test_audits_are_scheduled(api: ApiClient) -> None:
    audit = {"auto_audit_enabled": True, "auto_audit_interval_hours": 12}
    response = await put(api, audit=audit)
    assert response.json() == {
        "success": True,
        "message": "Settings updated successfully",
        "updated_settings": {"audit": audit},
    }
    assert (await api.request("bob", "GET", PATH)).json()["audit"] == audit
    async with api.database.read_transaction() as session:
        (schedule,) = await session.scalars(select(Schedule))
    assert (schedule.name, schedule.kind, schedule.enabled) == ("auto-audit", "audit_services", True)
    assert schedule.next_fire_at is not None
    await put(api, audit={"auto_audit_enabled": False})
    assert (await api.request("bob", "GET", PATH)).json()["audit"] == {**audit, "auto_audit_enabled": False}


@pytest.mark.parametrize("hours", list(CRON_BY_HOURS))
def test_the_cron_of_each_interval_has_equal_steps(hours: int) -> None:

    moment = schedules.next_fire(CRON_BY_HOURS[hours], "UTC", datetime(2026, 1, 30, tzinfo=UTC))
    for _ in range(40):
        following = schedules.next_fire(CRON_BY_HOURS[hours], "UTC", moment)
        assert following - moment == timedelta(hours=hours)
        moment = following


async def test_services_are_changed(api: ApiClient) -> None:
    await connect(api)
    response = await put(api, mcp_servers={"sonarr": {"url": "http://127.0.0.1:10", "enabled": False}})
    assert response.status_code == 200, response.text
    assert (await api.request("bob", "GET", PATH)).json()["mcp_servers"]["sonarr"] == {
        "enabled": False,
        "url": "http://127.0.0.1:10",
        "connected": None,
    }
    await put(api, mcp_servers={"TV": {"enabled": True}})
    async with api.database.read_transaction() as session:
        (job,) = await session.scalars(select(Job))
    assert job.kind == "check_services"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"llm": {"model": "x"}}, 422),
        ({"audit": {"auto_audit_interval_hours": 5}}, 422),
        ({"audit": {"auto_audit_interval_hours": None}}, 422),
        ({"audit": {"auto_audit_enabled": "yes"}}, 422),
        ({"audit": None}, 422),
        ({"audit": {"colour": 1}}, 422),
        ({"mcp_servers": {"radarr": {"enabled": True}}}, 404),
        ({"mcp_servers": {"nothing": {"enabled": True}}}, 404),
        ({"mcp_servers": {"sonarr": {"api_key": "x"}}}, 422),
        ({"mcp_servers": {"sonarr": {"url": "ftp://x"}}}, 400),
        ({"mcp_servers": {"sonarr": {"url": "http://10.0.0.1"}}}, 422),  # the key belongs to another address
        ({"mcp_servers": {"settled": {"enabled": False}}}, 409),
    ],
)
async def test_an_invalid_request_changes_nothing(api: ApiClient, body: dict[str, Any], status: int) -> None:
    await connect(api, api_key="0123456789")
    await connect(api, name="settled", declared=True)
    before = (await api.request("bob", "GET", PATH)).json()
    # The valid part of a refused request is not applied either.
    valid = {"sonarr": {"enabled": False}} if "mcp_servers" in body and "sonarr" not in body["mcp_servers"] else {}
    if valid:
        body = {"mcp_servers": {**valid, **body["mcp_servers"]}}
    response = await api.request("admin", "PUT", PATH, json=body)
    assert response.status_code == status, response.text
    assert (await api.request("bob", "GET", PATH)).json() == before


async def test_a_schedule_with_the_same_name_is_a_conflict(api: ApiClient) -> None:
    async with api.database.transaction() as session:
        await schedules.create(session, ScheduleRequest(name="auto-audit", kind="probe", cron="0 3 * * *"), LOCAL)
    assert (await put(api, audit={"auto_audit_enabled": True})).status_code == 409
    assert (await api.request("ada", "PUT", PATH, json={"audit": {"auto_audit_enabled": True}})).status_code == 403
