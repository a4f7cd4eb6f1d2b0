"""An audit of a real SABnzbd by a worker: settings are found, changed on trial, changed, and changed back."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.platform import Platform
from tests.support.services import real_services

pytestmark = pytest.mark.platform

CONFIG = "/api/v1/config"
SETTING = "pause_on_pwrar"


def test_a_setting_of_a_real_sabnzbd_is_found_changed_and_changed_back(platform: Platform, tmp_path: Path) -> None:
    with real_services.sabnzbd(tmp_path) as sabnzbd:

        def value() -> int:
            query = {"mode": "get_config", "section": "misc", "output": "json", "apikey": sabnzbd.key}
            answer = platform.http.get(f"{sabnzbd.url}/api", params=query)
            return answer.json()["config"]["misc"][SETTING]

        service = {"name": "Usenet", "type": "sabnzbd", "url": sabnzbd.url, "api_key": sabnzbd.key}
        post(platform, "/api/services", service)
        audit = post(platform, f"{CONFIG}/audit", {"services": ["sabnzbd"], "include_web_search": False})
        assert (audit["status"], audit["services_audited"]) == ("succeeded", ["sabnzbd"])
        page = platform.http.get(f"{CONFIG}/recommendations", params={"page_size": 100}).json()
        (found,) = [one for one in page["recommendations"] if one["setting_name"] == SETTING]
        assert (found["current_value"], found["recommended_value"], value()) == (1, 2, 1)

        ids = {"recommendation_ids": [found["id"]]}
        (tried,) = post(platform, f"{CONFIG}/apply", {**ids, "dry_run": True})["results"]
        assert (tried["success"], tried["changed"], value()) == (True, False, 1)
        (applied,) = post(platform, f"{CONFIG}/apply", ids)["results"]
        assert (applied["success"], applied["rollback_available"], value()) == (True, True, 2)
        (rolled_back,) = post(platform, f"{CONFIG}/rollback", ids)["results"]
        assert (rolled_back["success"], rolled_back["new_value"], value()) == (True, 1, 1)


def post(platform: Platform, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = platform.http.post(path, json=body)
    assert answer.is_success, answer.text
    return answer.json()
