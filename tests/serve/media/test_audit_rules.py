"""Every shipped rule that sets something: found, applied, read back and rolled back, each against its own service.

The fakes of Sonarr and Radarr check all writes against the official documents; SABnzbd is a real one. The stubs of
Prowlarr and Plex store what is written, and refuse values that the real services refuse.
"""

import copy
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipelines.media.audit import rules
from pipelines.media.audit.rules import Rule
from tests.serve.media.audit_requests import (
    add_service,
    get_config,
    get_recommendations,
    run_audit,
    run_change,
    set_config,
    set_misc,
)
from tests.support.api_client import ApiClient
from tests.support.audit_rules import settings_of
from tests.support.services import real_services
from tests.support.services.fake_arr import fake_arr
from tests.support.services.fake_services import KEY
from tests.support.services.stub_server import StubRequest, StubResponse, json_response, stub_server

State = dict[str, Any]
Service = AbstractAsyncContextManager[tuple[str, str, State]]
"""Its URL, its key, and its current settings by area."""

SABNZBD_CLIENT = {"id": 1, "name": "SAB", "implementation": "Sabnzbd", "enable": True, "protocol": "usenet"}
ARR_INITIAL: State = {
    "config/mediamanagement": {
        "id": 1,
        "copyUsingHardlinks": False,
        "downloadPropersAndRepacks": "preferAndUpgrade",
        "enableMediaInfo": False,
        "skipFreeSpaceCheckWhenImporting": True,
        "minimumFreeSpaceWhenImporting": 0,
    },
    "config/downloadclient": {"id": 1, "enableCompletedDownloadHandling": False, "autoRedownloadFailed": False},
    "config/host": {"id": 1, "certificateValidation": "disabled"},
    "config/indexer": {"id": 1, "rssSyncInterval": 0},
    "customformat": [{"id": 1, "name": "Repack v2"}],
    "downloadclient": [{**SABNZBD_CLIENT, "removeCompletedDownloads": False, "removeFailedDownloads": False}],
    "qualityprofile": [
        {
            "id": 1,
            "name": "Any",
            "upgradeAllowed": False,
            "cutoffFormatScore": 0,
            "minFormatScore": -100,
            "minUpgradeFormatScore": 0,
        }
    ],
}
NAMING_INITIAL: dict[str, State] = {
    "sonarr": {"renameEpisodes": False, "seasonFolderFormat": "S{season}"},
    "radarr": {"renameMovies": False},
}
SABNZBD_INITIAL = {
    "cache_limit": "",
    "direct_unpack": "0",
    "pause_on_post_processing": "1",
    "fail_hopeless_jobs": "0",
    "pre_check": "1",
    "safe_postproc": "0",
    "enable_recursive": "0",
    "ignore_samples": "1",
    "deobfuscate_final_filenames": "0",
    "enable_all_par": "1",
    "unwanted_extensions": "",
    "action_on_unwanted_extensions": "0",
    "pause_on_pwrar": "0",
    "propagation_delay": "0",
    "history_retention": "2d",
    "history_retention_number": "2",
}
OF_OTHER_RELEASES = {
    "misc": {"history_retention_option", "history_retention_number", "enable_tv_sorting", "enable_movie_sorting"}
}
"""SABnzbd 4 and later have the first pair, earlier versions the second."""
SYNC_LEVELS = {"disabled", "addOnly", "fullSync"}
"""Taken by hand from `ApplicationSyncLevel` of Prowlarr's official document."""
PLEX_VALUES: dict[str, set[str]] = {
    "GenerateBIFBehavior": {"never", "scheduled", "asap"},
    "secureConnections": set("012"),
}
"""Permitted values, from a server's own list (`/:/prefs`); all other settings are 0 or 1."""
PLEX_INITIAL: State = {
    "FSEventLibraryUpdatesEnabled": False,
    "FSEventLibraryPartialScanEnabled": False,
    "ScheduledLibraryUpdatesEnabled": True,
    "autoEmptyTrash": False,
    "allowMediaDeletion": True,
    "ScannerLowPriority": False,
    "GenerateBIFBehavior": "asap",
    "secureConnections": 2,
    "HardwareAcceleratedCodecs": False,
}


@asynccontextmanager
async def arr(service: str) -> AsyncGenerator[tuple[str, str, State]]:
    resources: dict[str, Any] = copy.deepcopy(ARR_INITIAL) | {"config/naming": {"id": 1, **NAMING_INITIAL[service]}}
    async with fake_arr(service, **resources) as server:
        yield server.url, KEY, server.resources


@asynccontextmanager
async def prowlarr() -> AsyncGenerator[tuple[str, str, State]]:
    state: State = {"applications": [{"id": 1, "name": "Sonarr", "syncLevel": "addOnly", "fields": [], "tags": []}]}

    def respond(request: StubRequest) -> StubResponse:
        area, _, number = request.path.removeprefix("/api/v1/").partition("/")
        if request.method == "PUT":
            (row,) = (row for row in state[area] if row["id"] == int(number))
            body = json.loads(request.body)
            if body["syncLevel"] not in SYNC_LEVELS:
                return json_response({"message": f"There is no sync level {body['syncLevel']}."}, 400)
            row.update(body)
            return json_response(row, 202)
        return json_response(state.get(area, []))

    async with stub_server(respond) as server:
        yield server.url, KEY, state


@asynccontextmanager
async def plex() -> AsyncGenerator[tuple[str, str, State]]:
    state = dict(PLEX_INITIAL)

    def respond(request: StubRequest) -> StubResponse:
        if request.method == "PUT":
            for name, value in request.query.items():
                if value not in PLEX_VALUES.get(name, set("01")):
                    return StubResponse(b"", 400)
                state[name] = type(PLEX_INITIAL[name])(int(value) if value.isdigit() else value)
            return StubResponse()
        return json_response({"MediaContainer": {"Setting": [{"id": name, "value": state[name]} for name in state]}})

    async with stub_server(respond) as server:
        yield server.url, KEY, state


SERVICES: dict[str, Callable[[], Service]] = {
    "sonarr": partial(arr, "sonarr"),
    "radarr": partial(arr, "radarr"),
    "prowlarr": prowlarr,
    "plex": plex,
}


def settable_rules(service: str) -> dict[str, Rule]:
    of_service = [rule for rule in rules.load().rules if rule.service == service and not rule.apply.is_by_hand]
    by_setting = {rule.setting: rule for rule in of_service}
    assert len(by_setting) == len(of_service) > 0
    return by_setting


async def apply_all(api: ApiClient, service: str) -> dict[str, int]:
    """Audit and apply until nothing is left: some rules depend on others. Returns recommendation ids by setting."""
    rules_by_setting, applied = settable_rules(service), dict[str, int]()
    while True:
        audit = await run_audit(api, service)
        assert audit["failed_services"] == {}
        recommendations = await get_recommendations(api, applied=False)
        ids = {
            recommendation["setting_name"]: recommendation["id"]
            for recommendation in recommendations.values()
            if recommendation["setting_name"] in rules_by_setting
        }
        if not ids:
            return applied
        assert not ids.keys() & applied.keys(), "an applied setting is found again"
        results = await run_change(api, "apply", *ids.values())
        assert [(result["success"], result["changed"]) for result in results] == [(True, True)] * len(ids), results
        applied |= ids


# Requests to services do not depend on Forgearr's own database.
on_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


@on_sqlite
@pytest.mark.parametrize("service", SERVICES)
async def test_every_rule_is_applied_and_rolled_back(api: ApiClient, service: str) -> None:
    async with SERVICES[service]() as (url, key, state):
        await add_service(api, service, service, url, key)
        before = copy.deepcopy(state)
        applied = await apply_all(api, service)
        assert applied.keys() == settable_rules(service).keys()
        after = copy.deepcopy(state)
        assert after != before
        again = await run_change(api, "apply", *applied.values())
        assert [(result["success"], result["changed"]) for result in again] == [(True, False)] * len(applied)
        assert state == after
        await run_change(api, "rollback", *applied.values())
        assert state == before


@on_sqlite
@pytest.mark.parametrize(
    ("option", "skipped"),
    [("days-delete", "history_retention_option"), ("number-delete", "history_retention_number")],
)
async def test_every_rule_for_sabnzbd_is_applied_and_rolled_back(
    api: ApiClient, tmp_path: Path, option: str, skipped: str
) -> None:
    with real_services.sabnzbd(tmp_path) as program:
        for name, value in {**SABNZBD_INITIAL, "history_retention_option": option}.items():
            set_misc(program, name, value)
        await add_service(api, "sabnzbd", "sabnzbd", program.url, program.key)
        before = get_config(program)
        applied = await apply_all(api, "sabnzbd")
        assert applied.keys() == (settable_rules("sabnzbd").keys() & before.keys()) - {skipped}
        await run_change(api, "rollback", *applied.values())
        assert get_config(program) == before


@pytest.mark.usefixtures("home")
def test_a_real_sabnzbd_has_every_setting(tmp_path: Path) -> None:
    """Including the settings that are changed by hand."""
    with real_services.sabnzbd(tmp_path) as program:
        set_config(program, section="categories", keyword="tv", name="tv")
        set_config(program, section="servers", keyword="one", name="one", host="news.example")
        for area in ("misc", "categories[]", "servers[]"):
            content = get_config(program, area.removesuffix("[]"))
            known = content if area == "misc" else content[0]
            of_service = [rule for rule in rules.load().rules if rule.service == "sabnzbd"]
            named = {setting for rule in of_service for rule_area, setting in settings_of(rule) if rule_area == area}
            assert named
            assert named - known.keys() <= OF_OTHER_RELEASES.get(area, set())
