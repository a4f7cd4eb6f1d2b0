"""API8:2023, security misconfiguration: what the server tells those who need not know it."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster import identity
from cluster.db import now
from cluster.services import store as service_store
from cluster.services.health_checks import ServiceCheck
from cluster.settings import get_settings
from pipelines.media.audit.tables import Audit, Recommendation
from pipelines.media.downloads.tables import FollowedService
from serve.monitoring import health
from serve.monitoring.health import Health
from tests.support.api_client import ApiClient
from tests.support.waiting import TIMEOUT

ERROR = "http://nas.home.lan:8989 does not respond"
CONFIG = "/api/v1/config"


@pytest.fixture
async def sonarr_id(api: ApiClient, monkeypatch: pytest.MonkeyPatch) -> int:
    """A service that does not work, and a second one of its type with a name that says where it is."""
    monkeypatch.setattr(health, "CHECK_TIMEOUT_SECONDS", TIMEOUT)
    async with api.database.transaction() as session:
        ids: list[int] = []
        for name in ("TV", "attic.home.lan"):
            values = {"name": name, "type": "sonarr", "url": "http://nas.home.lan:8989", "api_key": None}
            service = await service_store.create(session, values, "ada")
            check = ServiceCheck(service_id=service.id, at=now(), healthy=False, latency_ms=5.0, error=ERROR)
            session.add_all([check, FollowedService(service_id=service.id, connected_as_of=now())])
            ids.append(service.id)
    return ids[0]


def credential(api: ApiClient, name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {identity.create_access_token(api.users[name])}"}


async def test_learn_from_health_what_runs_where(api: ApiClient, sonarr_id: int) -> None:
    known = await api.http.get("/health", headers=credential(api, "bob"))
    services = known.json()["services"]
    assert services.keys() == {"sonarr", "attic.home.lan"}
    assert (services["sonarr"]["error"], services["sonarr"]["latency_ms"]) == (ERROR, 5.0)
    for headers in ({}, {"X-API-Key": "fgr_wrong"}):
        stranger = await api.http.get("/health", headers=headers)
        assert stranger.status_code == 200
        assert "home.lan" not in stranger.text
        assert stranger.json().keys() == known.json().keys(), "all documented fields are there"
        body = Health.model_validate(stranger.json())
        assert (body.status, body.components) == ("unhealthy", Health.model_validate(known.json()).components)
        assert stranger.json()["services"] == {
            "sonarr": {
                "healthy": False,
                "latency_ms": None,
                "error": None,
                "last_check": None,
                "circuit_breaker_state": "closed",
            }
        }


async def test_learn_from_metrics_what_runs_where(api: ApiClient, sonarr_id: int) -> None:
    await api.queue_job("probe", {})
    for headers in ({}, {"X-API-Key": "fgr_wrong"}):
        stranger = await api.http.get("/metrics", headers=headers)
        assert (stranger.status_code, 'service="' in stranger.text) == (200, False)
        assert 'jobs{kind="probe",state="queued"} 1.0' in stranger.text
    known = await api.http.get("/metrics", headers=credential(api, "bob"))
    assert 'downloads_in_queue{service="attic.home.lan"}' in known.text


async def test_a_server_without_credentials_tells_its_users_everything(
    api: ApiClient, sonarr_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGEARR_AUTH__REQUIRED", "false")
    get_settings.cache_clear()
    transport = httpx.ASGITransport(api.app, client=("127.0.0.1", 40000))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        services = (await client.get("/health")).json()["services"]
        assert services["attic.home.lan"]["error"] == ERROR
        assert 'service="attic.home.lan"' in (await client.get("/metrics")).text


async def test_learn_from_recommendations_which_service_has_no_login(api: ApiClient, sonarr_id: int) -> None:
    async with api.database.transaction() as session:
        rows = [recommendation(sonarr_id, category) for category in ("security", "performance")]
        session.add_all(rows)
    seen: dict[str, list[Any]] = {}
    for name in ("bob", "admin"):
        listed = (await api.request(name, "GET", f"{CONFIG}/recommendations")).json()["recommendations"]
        values = {row["category"]: row["current_value"] for row in listed}
        for row in rows:
            detail = (await api.request(name, "GET", f"{CONFIG}/recommendations/{row.id}")).json()
            assert detail["current_value"] == values[row.category]
        seen[name] = [values["security"], values["performance"]]
    assert seen == {"bob": [None, "none"], "admin": ["none", "none"]}


async def test_learn_from_rule_problems_where_files_are(
    api: ApiClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "private rules"
    folder.mkdir()
    (folder / "mine.yaml").write_text("- {id: broken}\n")
    (folder / "folder.yaml").mkdir()
    monkeypatch.setenv("FORGEARR_AUDIT__RULES", str(folder))
    get_settings.cache_clear()
    problems = (await api.request("admin", "GET", f"{CONFIG}/rules")).json()["problems"]
    reasons = ["folder.yaml:1: It cannot be read: Is a directory.", "mine.yaml:1: service: Field required."]
    assert problems == [f"{folder}/{reason}" for reason in reasons]
    assert (await api.request("bob", "GET", f"{CONFIG}/rules")).json()["problems"] == reasons
    async with api.database.transaction() as session:
        session.add(audit(problems))
    for name, expected in (("admin", problems), ("bob", reasons)):
        assert (await api.request(name, "GET", f"{CONFIG}/audit/audit_1")).json()["rule_problems"] == expected


def recommendation(service_id: int, category: str) -> Recommendation:
    return Recommendation(
        service_id=service_id,
        rule_id=f"sonarr.{category}",
        area="host",
        setting="authenticationMethod",
        entry="",
        entry_name="",
        category=category,
        priority="high",
        current_value="none",
        recommended_value="forms",
        by_hand="Set a password.",
        rationale="Because.",
        explanation="So.",
        impact="None.",
        references=[],
        sources=[],
    )


def audit(rule_problems: list[str]) -> Audit:
    return Audit(
        id="audit_1",
        at=now(),
        services=[],
        failed={},
        summary={},
        counts={"critical": 0, "high": 0, "medium": 0, "low": 0},
        total=0,
        rule_problems=rule_problems,
        web_search={"used": False, "reason": None, "searches": 0},
        created_by="ada",
    )
