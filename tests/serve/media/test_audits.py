"""The routes of audits, with a real SABnzbd and a fake Sonarr."""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select, text

from cluster import events
from cluster.db import Base, Database
from cluster.services import store as service_store
from cluster.settings import get_settings
from jobs.tables import Job
from pipelines.media.audit import audit_services, change_settings
from pipelines.media.audit import tables as audit_tables
from pipelines.media.audit.tables import Recommendation, SettingChange
from serve.security import rate_limits
from tests.serve.media.audit_requests import (
    PATH,
    add_service,
    get_config,
    get_recommendations,
    run_audit,
    run_change,
    set_config,
    set_misc,
)
from tests.support import run_jobs
from tests.support.api_client import ApiClient
from tests.support.services import real_services
from tests.support.services.fake_arr import FakeArr, fake_arr
from tests.support.services.fake_services import KEY
from tests.support.services.real_services import RunningService
from tests.support.services.stub_server import StubRequest, StubResponse, html_page, json_response, stub_server

PASSWORD = "geheim-geheim-7"
UNREACHABLE = "http://127.0.0.1:9"
INITIAL_SETTINGS = {
    "fail_hopeless_jobs": "0",
    "pre_check": "0",
    "propagation_delay": "7",
    "unwanted_extensions": "",
    "direct_unpack": "0",
    "safe_postproc": "1",
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with real_services.sabnzbd(tmp_path_factory.mktemp("sabnzbd")) as running:
        yield running


@pytest.fixture
async def sabnzbd(program: RunningService, api: ApiClient) -> RunningService:
    """Connect SABnzbd, and reset the settings that tests change."""
    for name, value in INITIAL_SETTINGS.items():
        set_misc(program, name, value)
    await add_service(api, "SAB", "sabnzbd", program.url, program.key)
    return program


@pytest.fixture
async def sonarr(api: ApiClient) -> AsyncIterator[FakeArr]:
    async with fake_arr("sonarr", **sonarr_resources()) as arr:
        await add_service(api, "TV", "sonarr", arr.url, KEY)
        yield arr


@pytest.fixture
def custom_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, api: ApiClient) -> Callable[[str], Path]:
    monkeypatch.setenv("FORGEARR_AUDIT__RULES", str(tmp_path / "rules"))
    get_settings.cache_clear()
    (tmp_path / "rules").mkdir()
    file = tmp_path / "rules" / "mine.yaml"

    def write(rules: str) -> Path:
        file.write_text(rules)
        return file

    return write


async def test_an_audit_response_is_as_documented(api: ApiClient, sabnzbd: RunningService) -> None:
    audit = await run_audit(api, "sabnzbd")
    assert audit["audit_id"].startswith("audit_")
    assert (audit["services_audited"], audit["status"], audit["failed_services"]) == (["sabnzbd"], "succeeded", {})
    total = audit["total_recommendations"]
    assert total == sum(audit["recommendations_by_priority"].values()) > 5
    assert list(audit["recommendations_by_priority"]) == ["critical", "high", "medium", "low"]
    assert audit["summary"] == {"sabnzbd": {"issues_found": total, "recommendations": total}}
    assert audit["web_search"] == {"used": False, "reason": "It was not requested.", "searches": 0}
    assert (await api.request("bob", "GET", f"{PATH}/audit/{audit['audit_id']}")).json() == audit

    listed = (await api.request("bob", "GET", f"{PATH}/recommendations?service=SAB&priority=high&page_size=2")).json()
    high = audit["recommendations_by_priority"]["high"]
    assert listed["pagination"] == {"page": 1, "page_size": 2, "total_items": high, "total_pages": -(-high // 2)}
    assert listed["filters_applied"] == {"service": "SAB", "priority": "high"}
    assert len(listed["recommendations"]) == 2
    hopeless = (await get_recommendations(api))["fail_hopeless_jobs"]
    assert (hopeless["service"], hopeless["category"], hopeless["priority"]) == ("sabnzbd", "performance", "high")
    assert (hopeless["current_value"], hopeless["recommended_value"], hopeless["applied"]) == (0, 1, False)
    detail = (await api.request("bob", "GET", f"{PATH}/recommendations/{hopeless['id']}")).json()
    assert detail.items() >= hopeless.items()
    assert detail["explanation"]
    assert detail["references"][0].startswith("https://sabnzbd.org/wiki/")
    assert (detail["applied_at"], detail["closed_at"]) == (None, None)
    missing = await api.request("bob", "GET", f"{PATH}/recommendations/999999")
    assert (missing.status_code, missing.json()["message"]) == (404, "Recommendation with ID 999999 not found")


@pytest.mark.both_databases
async def test_a_recommendation_keeps_its_id_while_its_finding_persists(
    api: ApiClient, sabnzbd: RunningService
) -> None:
    first = await run_audit(api, "sabnzbd")
    before = await get_recommendations(api)
    set_misc(sabnzbd, "direct_unpack", "1")
    set_misc(sabnzbd, "pre_check", "1")
    second = await run_audit(api, "SAB")
    after = await get_recommendations(api)
    assert after.keys() == before.keys() - {"direct_unpack"} | {"pre_check"}
    assert {name: after[name]["id"] for name in before if name in after} == {
        name: recommendation["id"] for name, recommendation in before.items() if name in after
    }
    closed = (await api.request("bob", "GET", f"{PATH}/recommendations/{before['direct_unpack']['id']}")).json()
    assert closed["closed_at"] is not None
    history = (await api.request("bob", "GET", f"{PATH}/audit/history")).json()
    assert [audit["audit_id"] for audit in history["audits"]] == [second["audit_id"], first["audit_id"]]
    assert history["pagination"]["total_items"] == 2
    (result,) = await run_change(api, "apply", before["direct_unpack"]["id"])
    assert (result["success"], result["changed"], result["rollback_available"]) == (True, False, False)


@pytest.mark.both_databases
async def test_settings_are_applied_once_and_rolled_back(api: ApiClient, sabnzbd: RunningService) -> None:
    audit = await run_audit(api, "sabnzbd")
    recommendations = await get_recommendations(api)
    ids = [recommendations[name]["id"] for name in ("fail_hopeless_jobs", "unwanted_extensions", "nzb_backup_dir")]

    before = get_config(sabnzbd)
    dry_results = await run_change(api, "apply", *ids, dry_run=True)
    assert [(result["success"], result["changed"]) for result in dry_results] == [
        (True, False),
        (True, False),
        (False, False),
    ]
    assert (dry_results[0]["previous_value"], dry_results[0]["new_value"], dry_results[0]["message"]) == (
        0,
        1,
        "It would be changed",
    )
    assert get_config(sabnzbd) == before

    first = await run_change(api, "apply", *ids)
    assert [result["success"] for result in first] == [True, True, False]
    assert (first[0]["message"], first[0]["rollback_available"]) == ("Configuration applied successfully", True)
    assert (first[2]["error"], first[2]["message"][:22]) == ("by_hand", "Must be done by hand: ")
    live = get_config(sabnzbd)
    assert live["fail_hopeless_jobs"] == 1
    assert live["unwanted_extensions"] == recommendations["unwanted_extensions"]["recommended_value"]
    assert (await get_recommendations(api, applied=True)).keys() == {"fail_hopeless_jobs", "unwanted_extensions"}

    again = await run_change(api, "apply", *ids[:2])
    assert [(result["success"], result["changed"], result["rollback_available"]) for result in again] == [
        (True, False, True)
    ] * 2
    assert get_config(sabnzbd) == live
    (listed,) = (await api.request("bob", "GET", f"{PATH}/audit/history")).json()["audits"]
    assert (listed["applied_count"], listed["total_recommendations"]) == (2, audit["total_recommendations"])

    back = await run_change(api, "rollback", ids[0])
    assert (back[0]["success"], back[0]["previous_value"], back[0]["new_value"]) == (True, 1, 0)
    assert get_config(sabnzbd)["fail_hopeless_jobs"] == 0
    (repeated,) = await run_change(api, "rollback", ids[0])
    assert (repeated["success"], repeated["error"]) == (False, "conflict")
    assert (await get_recommendations(api))["fail_hopeless_jobs"]["applied"] is False
    (listed,) = (await api.request("bob", "GET", f"{PATH}/audit/history")).json()["audits"]
    assert listed["applied_count"] == 1
    await run_change(api, "rollback", ids[1])
    assert get_config(sabnzbd) == before


async def test_settings_changed_by_hand_are_not_overwritten(api: ApiClient, sabnzbd: RunningService) -> None:
    set_misc(sabnzbd, "propagation_delay", "1")
    await run_audit(api, "sabnzbd")
    recommendations = await get_recommendations(api)
    set_misc(sabnzbd, "propagation_delay", "3")
    (result,) = await run_change(api, "apply", recommendations["propagation_delay"]["id"])
    assert (result["success"], result["error"], result["previous_value"]) == (False, "changed_since", 3)
    assert get_config(sabnzbd)["propagation_delay"] == 3

    (result,) = await run_change(api, "apply", recommendations["fail_hopeless_jobs"]["id"])
    assert result["success"]
    await run_audit(api, "sabnzbd")
    (result,) = await run_change(api, "apply", (await get_recommendations(api))["propagation_delay"]["id"])
    assert (result["success"], result["previous_value"], result["new_value"]) == (True, 3, 5)
    set_misc(sabnzbd, "propagation_delay", "20")
    (result,) = await run_change(api, "rollback", recommendations["propagation_delay"]["id"])
    assert (result["success"], result["error"]) == (False, "changed_since")
    assert get_config(sabnzbd)["propagation_delay"] == 20


RULE = """
- id: {id}
  service: sabnzbd
  area: '{area}'
  setting: {setting}
  expect: {{equals: {value}}}
  apply: {{set: {value}}}
  category: performance
  priority: critical
  rationale: Because.
  explanation: So.
  impact: None.
  references: []
"""


async def test_a_rejected_value_is_reported_and_the_previous_one_restored(
    api: ApiClient, sabnzbd: RunningService, custom_rules: Callable[[str], Path]
) -> None:
    file = custom_rules(
        RULE.format(id="soon", area="misc", setting="propagation_delay", value="soon")
        + RULE.format(id="open", area="misc", setting="inet_exposure", value="99")
        + "- {id: broken}\n"
    )
    audit = await run_audit(api, "sabnzbd")
    assert audit["rule_problems"] == [f"{file}:27: service: Field required."]
    recommendations = await get_recommendations(api, priority="critical")
    soon, exposure = await run_change(
        api, "apply", recommendations["propagation_delay"]["id"], recommendations["inet_exposure"]["id"]
    )
    assert (soon["success"], soon["error"]) == (False, "not_taken")
    assert "became 0: the service did not accept" in soon["message"]
    assert (exposure["success"], exposure["error"]) == (False, "not_taken")
    live = get_config(sabnzbd)
    assert (live["propagation_delay"], live["inet_exposure"]) == (7, 0)
    (rollback,) = await run_change(api, "rollback", recommendations["propagation_delay"]["id"])
    assert rollback["success"] is False


async def test_list_items_are_changed_but_never_created(
    api: ApiClient, sabnzbd: RunningService, custom_rules: Callable[[str], Path]
) -> None:
    custom_rules(RULE.format(id="folder", area="categories[]", setting="dir", value="shows"))
    # SABnzbd creates its default categories if there is none.
    set_config(sabnzbd, section="categories", keyword="*", name="*")
    set_config(sabnzbd, section="categories", keyword="tv", name="tv", dir="tv*")
    await run_audit(api, "sabnzbd")
    recommendation = (await get_recommendations(api, priority="critical"))["tv.dir"]
    assert (recommendation["area"], recommendation["item"], recommendation["current_value"]) == (
        "categories[]",
        "tv",
        "tv*",
    )
    before = get_config(sabnzbd, "categories")
    (result,) = await run_change(api, "apply", recommendation["id"])
    assert result["success"], result
    assert get_config(sabnzbd, "categories") == [
        {**category, "dir": "shows"} if category["name"] == "tv" else category for category in before
    ]
    await run_change(api, "rollback", recommendation["id"])
    assert get_config(sabnzbd, "categories") == before
    set_config(sabnzbd, mode="del_config", section="categories", keyword="tv")
    (result,) = await run_change(api, "apply", recommendation["id"])
    assert (result["success"], result["error"]) == (False, "not_found")


async def test_secrets_are_never_stored(
    api: ApiClient, sabnzbd: RunningService, custom_rules: Callable[[str], Path]
) -> None:
    server = {"keyword": "one", "name": "one", "host": "news.example", "username": "ada"}
    set_config(sabnzbd, section="servers", **server, password=PASSWORD)
    spying = RULE.format(id="spy", area="misc", setting="api_key", value="x").replace("{set: x}", "{by_hand: Look.}")
    custom_rules(spying)
    await run_audit(api, "sabnzbd")
    recommendations = await get_recommendations(api)
    assert recommendations["api_key"]["current_value"] == "********"
    await run_change(api, "apply", recommendations["fail_hopeless_jobs"]["id"])
    rows: list[Any] = []
    async with api.database.read_transaction() as session:
        for table in Base.metadata.sorted_tables:
            if table.name != "services":
                rows += [[*row] for row in await session.execute(text(f'SELECT * FROM "{table.name}"'))]
    assert sabnzbd.key not in str(rows)
    assert PASSWORD not in str(rows)


# Sonarr


def sonarr_resources() -> dict[str, Any]:
    client = {
        "id": 3,
        "name": 'SAB "🎬"',
        "implementation": "Sabnzbd",
        "configContract": "SabnzbdSettings",
        "enable": True,
        "protocol": "usenet",
        "priority": 1,
        "removeCompletedDownloads": False,
        "removeFailedDownloads": True,
        "tags": [],
        "fields": [{"name": "host", "value": "sab"}, {"name": "apiKey", "value": "********", "privacy": "apiKey"}],
    }
    return {
        "config/mediamanagement": {"id": 1, "copyUsingHardlinks": False, "minimumFreeSpaceWhenImporting": 0},
        "config/naming": {"id": 1, "renameEpisodes": True, "standardEpisodeFormat": "{Series Title}"},
        "config/downloadclient": {"id": 1, "enableCompletedDownloadHandling": True, "autoRedownloadFailed": False},
        "config/indexer": {"id": 1, "rssSyncInterval": 0},
        "config/host": {
            "id": 1,
            "authenticationMethod": "none",
            "certificateValidation": "disabled",
            "apiKey": PASSWORD,
            "password": "********",
        },
        "downloadclient": [client],
        "indexer": [],
        "qualitydefinition": [{"id": 1, "title": "HDTV-720p", "maxSize": 100.0, "preferredSize": 995.0}],
        "remotepathmapping": [{"id": 1, "host": "sab", "remotePath": "/downloads", "localPath": "/tv/downloads"}],
        "customformat": [],
        "health": [
            {
                "id": 1,
                "source": "UpdateCheck",
                "type": "warning",
                "message": "New",
                "wikiUrl": {"fullUri": "https://wiki"},
            }
        ],
    }


async def test_writes_to_sonarr_change_nothing_else(api: ApiClient, sonarr: FakeArr) -> None:
    before = json.loads(json.dumps(sonarr.resources))
    audit = await run_audit(api, "sonarr")
    assert audit["failed_services"] == {}
    recommendations = await get_recommendations(api)
    assert recommendations["rssSyncInterval"]["current_value"] == 0
    assert recommendations["enableRss"]["current_value"] == []  # there is no indexer at all
    assert recommendations["maxSize"]["current_value"] == ["HDTV-720p: 100.0"]
    assert recommendations["UpdateCheck.message"]["current_value"] == "New"
    detail = (
        await api.request("bob", "GET", f"{PATH}/recommendations/{recommendations['UpdateCheck.message']['id']}")
    ).json()
    assert "https://wiki" in detail["references"]
    names = ["copyUsingHardlinks", "rssSyncInterval", 'SAB "🎬".removeCompletedDownloads']
    results = await run_change(api, "apply", *(recommendations[name]["id"] for name in names))
    assert [result["success"] for result in results] == [True, True, True], results
    expected = json.loads(json.dumps(before))
    expected["config/mediamanagement"]["copyUsingHardlinks"] = True
    expected["config/indexer"]["rssSyncInterval"] = 15
    expected["downloadclient"][0]["removeCompletedDownloads"] = True
    assert sonarr.resources == expected
    await run_change(api, "rollback", *(recommendations[name]["id"] for name in names))
    assert sonarr.resources == before


async def test_a_failed_restore_can_be_rolled_back_later(api: ApiClient) -> None:
    writes: list[int] = []

    def before(request: StubRequest) -> StubResponse | None:
        if request.method != "PUT":
            return None
        writes.append(json.loads(request.body)["rssSyncInterval"])
        if len(writes) == 1:
            arr.resources["config/indexer"]["rssSyncInterval"] = 10
            return json_response(arr.resources["config/indexer"], 202)
        return json_response({"message": "Not now"}, 503) if len(writes) == 2 else None

    async with fake_arr("sonarr", before, **sonarr_resources()) as arr:
        await add_service(api, "TV", "sonarr", arr.url, KEY)
        await run_audit(api, "sonarr")
        recommendation_id = (await get_recommendations(api))["rssSyncInterval"]["id"]
        (result,) = await run_change(api, "apply", recommendation_id)
        assert (result["success"], result["error"]) == (False, "not_taken")
        assert "became 10, and the previous one could not be restored" in result["message"]
        (result,) = await run_change(api, "rollback", recommendation_id)
        assert (result["success"], result["changed"]) == (True, True), result
        assert writes == [15, 0, 0]
        assert arr.resources["config/indexer"]["rssSyncInterval"] == 0


async def test_a_masked_password_is_never_written_back(api: ApiClient, sonarr: FakeArr) -> None:
    await run_audit(api, "sonarr")
    recommendations = await get_recommendations(api)
    (result,) = await run_change(api, "apply", recommendations["certificateValidation"]["id"])
    assert result["success"] is False
    assert "masks its setting 'password'" in result["message"]
    assert not [request for request in sonarr.requests if request.method == "PUT"]


async def test_an_audit_of_several_services_reports_unreachable_ones(api: ApiClient, sonarr: FakeArr) -> None:
    await add_service(api, "Movies", "radarr", UNREACHABLE, KEY)
    half = StubResponse(b'{"MediaContainer": {"Setting": [{"id": "auto')
    async with stub_server(lambda request: half) as plex:
        await add_service(api, "plex", "plex", plex.url, KEY)
        audit = await run_audit(api, "sonarr", "radarr", "plex")
    assert audit["services_audited"] == ["sonarr"]
    assert audit["failed_services"].keys() == {"radarr", "plex"}
    assert "cannot be reached" in audit["failed_services"]["radarr"]
    assert "only a part of it" in audit["failed_services"]["plex"]


@pytest.mark.parametrize(
    "response",
    [
        json_response({}),
        json_response([]),
        json_response({"MediaContainer": None}),
        json_response({"MediaContainer": {"Setting": [{"id": 5}]}}),
        json_response({"MediaContainer": {"Setting": {"id": "x"}}}),
        html_page("Welcome"),
        StubResponse(b"[" * 100_000),
    ],
)
async def test_malformed_responses_fail_only_their_service(api: ApiClient, response: StubResponse) -> None:
    async with stub_server(lambda request: response) as plex:
        await add_service(api, "plex", "plex", plex.url, KEY)
        audit = await run_audit(api, "plex")
    assert audit["services_audited"] == []
    assert list(audit["failed_services"]) == ["plex"]


async def test_open_recommendations_stay_open_while_a_service_is_unreachable(api: ApiClient, sonarr: FakeArr) -> None:
    await run_audit(api, "sonarr")
    before = await get_recommendations(api)
    async with api.database.transaction() as session:
        service = await service_store.find(session, "sonarr")
        assert service
        service.url = UNREACHABLE
    audit = await run_audit(api, "sonarr")
    assert list(audit["failed_services"]) == ["sonarr"]
    assert (await get_recommendations(api)).keys() == before.keys()
    both = [before["copyUsingHardlinks"]["id"], before["rssSyncInterval"]["id"], 999999]
    results = await run_change(api, "apply", *both)
    assert [result["error"] for result in results] == ["mcp_connection_error", "mcp_connection_error", "not_found"]
    assert results[0]["message"].startswith("Service connection failed")
    assert results[2]["message"] == "Recommendation with ID 999999 not found"


async def test_plex_settings_are_written_as_query_parameters(api: ApiClient) -> None:
    settings: dict[str, Any] = {"autoEmptyTrash": True, "allowMediaDeletion": True, "PlexOnlineToken": PASSWORD}

    def respond(request: Any) -> StubResponse:
        if request.method == "PUT":
            settings.update({name: value == "1" for name, value in request.query.items()})
            return StubResponse()
        return json_response(
            {"MediaContainer": {"Setting": [{"id": name, "value": settings[name]} for name in settings]}}
        )

    async with stub_server(respond) as plex:
        await add_service(api, "plex", "plex", plex.url, KEY)
        audit = await run_audit(api, "plex")
        assert audit["total_recommendations"] == 1  # settings that this version lacks yield no recommendation
        recommendation = (await get_recommendations(api))["allowMediaDeletion"]
        (result,) = await run_change(api, "apply", recommendation["id"])
    assert result["success"], result
    assert settings["allowMediaDeletion"] is False
    assert plex.requests[-2].query == {"allowMediaDeletion": "0"}


async def test_an_outdated_recommendation_is_not_applied(api: ApiClient) -> None:
    settings = {"FSEventLibraryUpdatesEnabled": True, "ScheduledLibraryUpdatesEnabled": True}

    def respond(request: StubRequest) -> StubResponse:
        return json_response(
            {"MediaContainer": {"Setting": [{"id": name, "value": settings[name]} for name in settings]}}
        )

    async with stub_server(respond) as plex:
        await add_service(api, "plex", "plex", plex.url, KEY)
        await run_audit(api, "plex")
        recommendation = (await get_recommendations(api))["ScheduledLibraryUpdatesEnabled"]
        settings["FSEventLibraryUpdatesEnabled"] = False  # Plex would no longer find new files at all
        for dry_run in (True, False):
            (result,) = await run_change(api, "apply", recommendation["id"], dry_run=dry_run)
            assert (result["success"], result["error"]) == (False, "changed_since")
        assert {request.method for request in plex.requests} == {"GET"}


async def test_a_different_item_with_the_same_id_is_not_changed(api: ApiClient, sonarr: FakeArr) -> None:
    await run_audit(api, "sonarr")
    recommendation = (await get_recommendations(api))['SAB "🎬".removeCompletedDownloads']
    sonarr.rows("downloadclient")[0]["name"] = "Another"
    (result,) = await run_change(api, "apply", recommendation["id"])
    assert (result["success"], result["error"]) == (False, "changed_since")
    assert sonarr.rows("downloadclient")[0]["removeCompletedDownloads"] is False


# The routes


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"services": []}, 400, "At least one service must be specified"),
        ({"services": ["nothing"]}, 404, "There is no service named 'nothing'"),
        ({"services": ["plex"]}, 503, "Service 'plex' is not connected"),
        ({"services": ["search"]}, 400, "search is not a service that lets its settings be read"),
        ({}, 422, "services"),
        ({"services": ["a"], "colour": 1}, 422, "colour"),
        ({"services": [1]}, 422, "services"),
    ],
)
async def test_invalid_audit_requests_are_refused(api: ApiClient, body: Any, status: int, message: str) -> None:
    await add_service(api, "search", "searxng", UNREACHABLE)
    response = await api.request("admin", "POST", f"{PATH}/audit", json=body)
    assert (response.status_code, message in response.json()["message"]) == (status, True), response.text
    assert (await api.count_kinds())[audit_services.KIND] == 0


@pytest.mark.parametrize(
    ("ids", "status"), [([], 400), ([0], 422), ([2**63], 422), (["1"], 422), (list(range(1, 102)), 422)]
)
async def test_invalid_change_requests_are_refused(api: ApiClient, ids: list[Any], status: int) -> None:
    for action in ("apply", "rollback"):
        response = await api.request("admin", "POST", f"{PATH}/{action}", json={"recommendation_ids": ids})
        assert response.status_code == status, response.text
    assert (await api.count_kinds())[change_settings.KIND] == 0


async def test_only_administrators_audit_and_change(api: ApiClient) -> None:
    for action, body in (("audit", {"services": ["plex"]}), ("apply", {"recommendation_ids": [1]})):
        assert (await api.request("ada", "POST", f"{PATH}/{action}", json=body)).status_code == 403
    for path in ("audit/history", "recommendations", "rules"):
        assert (await api.request("ada", "GET", f"{PATH}/{path}")).status_code == 200


async def test_an_unfinished_audit_can_be_read(api: ApiClient, sonarr: FakeArr) -> None:
    body = {"services": ["sonarr"], "include_web_search": False}
    accepted = await api.request("admin", "POST", f"{PATH}/audit?wait=0", json=body)
    assert (accepted.status_code, accepted.json()["status"], accepted.json()["total_recommendations"]) == (
        202,
        "queued",
        None,
    )
    address = f"{PATH}/audit/{accepted.json()['audit_id']}"
    assert (await api.request("bob", "GET", address)).json()["status"] == "queued"
    await run_jobs.run_queued(api.database, audit_services.KIND)
    assert (await api.request("bob", "GET", address)).json()["status"] == "succeeded"
    for wrong in ("audit_x", "job_x", accepted.json()["job_id"], "audit_%2e%2e"):
        assert (await api.request("bob", "GET", f"{PATH}/audit/{wrong}")).status_code == 404


async def test_an_audit_is_published_to_its_room_and_its_metrics_to_mlflow(
    api: ApiClient, sonarr: FakeArr, monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[events.Message] = []
    monkeypatch.setattr(events, "publish", published.extend)
    accepted = await api.request("admin", "POST", f"{PATH}/audit?wait=0", json={"services": ["sonarr"]})
    (link,) = await run_jobs.run_queued(api.database, audit_services.KIND)
    (message,) = [message for message in published if message["type"] == "config.audit.completed"]
    total = link.metrics["recommendations"]
    assert message["rooms"] == ["config_audit"]
    assert message["data"] == {"audit_id": accepted.json()["audit_id"], "recommendation_count": total}
    assert message["timestamp"].endswith("Z")
    assert sum(link.metrics[f"priority_{name}"] for name in ("critical", "high", "medium", "low")) == total
    async with api.database.read_transaction() as session:
        (job,) = await session.scalars(select(Job))
    assert (job.tracked, job.concurrency) == (True, 1)
    assert job.result
    assert job.result["web_search"]["reason"].startswith("No service is connected that searches the web.")


async def test_findings_are_searched_for_on_the_web(api: ApiClient, sonarr: FakeArr) -> None:
    pages = [
        {"title": "Hardlinks", "url": "https://guide.example/hardlinks"},
        {"title": "Script", "url": "javascript:alert(1)"},
        {"url": "https://guide.example/2"},
        {"url": "https://guide.example/3"},
        {"url": "https://guide.example/4"},
    ]
    async with stub_server(lambda request: json_response({"query": request.query["q"], "results": pages})) as searx:
        await add_service(api, "search", "searxng", searx.url)
        audit = await run_audit(api, "sonarr", include_web_search=True)
        assert audit["web_search"] == {"used": True, "reason": None, "searches": 12}
        assert {request.query["format"] for request in searx.requests} == {"json"}
        assert "Sonarr copyUsingHardlinks recommended setting" in {request.query["q"] for request in searx.requests}
    hardlinks = (await get_recommendations(api))["copyUsingHardlinks"]
    detail = (await api.request("bob", "GET", f"{PATH}/recommendations/{hardlinks['id']}")).json()
    assert detail["sources"] == [f"https://guide.example/{end}" for end in ("hardlinks", "2", "3")]
    audit = await run_audit(api, "sonarr", include_web_search=True)  # the search service is down now
    assert audit["web_search"]["used"] is False
    assert "cannot be reached" in audit["web_search"]["reason"]
    assert (await api.request("bob", "GET", f"{PATH}/recommendations/{hardlinks['id']}")).json()["sources"] == detail[
        "sources"
    ]


async def test_audits_and_changes_have_their_own_rate_limits(api: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_LIMITS__ENABLED", "true")
    get_settings.cache_clear()
    rate_limits.limiter.cache_clear()
    for action, amount in (("audit", 10), ("apply", 20), ("rollback", 20)):
        response = await api.request("ada", "POST", f"{PATH}/{action}", json={})
        assert response.headers["x-ratelimit-limit"] == str(amount), action
    assert response.headers["x-ratelimit-remaining"] == "18"  # apply and rollback share one limit
    for path in ("recommendations", "recommendations/1", "audit/history", "rules"):
        assert (await api.request("ada", "GET", f"{PATH}/{path}")).headers["x-ratelimit-limit"] == "50"
    for _ in range(10):
        response = await api.request("ada", "POST", f"{PATH}/audit", json={})
    assert response.status_code == 429
    assert (await api.request("bob", "POST", f"{PATH}/audit", json={})).status_code == 403
    rate_limits.limiter.cache_clear()


@pytest.mark.both_databases
async def test_a_lost_attempt_changes_settings_once(api: ApiClient, sonarr: FakeArr, database: Database) -> None:
    """A worker may die after an audit or a change has ended and before it is reported."""
    await run_audit(api, "sonarr")
    recommendation = (await get_recommendations(api))["copyUsingHardlinks"]
    async with database.transaction() as session:
        session.add(
            SettingChange(recommendation_id=recommendation["id"], previous=False, new=True, outcome="begun", by="ada")
        )
    sonarr.resources["config/mediamanagement"]["copyUsingHardlinks"] = True
    (result,) = await run_change(api, "apply", recommendation["id"])
    assert (result["success"], result["changed"], result["rollback_available"]) == (True, False, True)

    # Rolled back after the request was queued: by a lost attempt of this job, or by another request for the same.
    async def roll_back() -> list[httpx.Response]:
        body = {"recommendation_ids": [recommendation["id"]]}
        keys = [{"Idempotency-Key": key} for key in ("one", "two")]
        return [await api.request("admin", "POST", f"{PATH}/rollback?wait=0", json=body, headers=key) for key in keys]

    await roll_back()
    await run_jobs.run_queued(database, change_settings.KIND)
    results = [response.json()["results"][0] for response in await roll_back()]
    assert [(result["success"], result["changed"]) for result in results] == [(True, True), (True, False)]
    assert sonarr.resources["config/mediamanagement"]["copyUsingHardlinks"] is False


@pytest.mark.both_databases
async def test_old_audits_are_removed(api: ApiClient, sonarr: FakeArr, database: Database) -> None:
    await run_audit(api, "sonarr")
    sonarr.resources["config/indexer"]["rssSyncInterval"] = 15
    await run_audit(api, "sonarr")
    assert await audit_tables.remove_old(database) == 0
    async with database.transaction() as session:
        await session.execute(text("UPDATE audits SET at = '2020-01-01 00:00:00+00:00'"))
        await session.execute(
            text("UPDATE recommendations SET closed_at = '2020-01-01 00:00:00+00:00' WHERE closed_at IS NOT NULL")
        )
    assert await audit_tables.remove_old(database) == 1
    async with database.read_transaction() as session:
        assert not (await session.scalars(select(Recommendation).where(Recommendation.closed_at.is_not(None)))).all()
    assert (await api.request("bob", "GET", f"{PATH}/audit/history")).json()["audits"] == []


@pytest.mark.both_databases
async def test_deleting_a_service_deletes_its_recommendations(api: ApiClient, sonarr: FakeArr) -> None:
    await run_audit(api, "sonarr")
    async with api.database.transaction() as session:
        service = await service_store.find(session, "sonarr")
        assert service
        await service_store.delete(session, service)
    assert await get_recommendations(api) == {}
    assert len((await api.request("bob", "GET", f"{PATH}/audit/history")).json()["audits"]) == 1
