"""An audit of a real SABnzbd: a finding, a dry run, the change of the setting, and its rollback."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.platform import Platform
from tests.support.services import real_services

pytestmark = pytest.mark.platform

CONFIG = "/api/v1/config"
SETTING = "pause_on_pwrar"


def test_a_recommendation_is_applied_to_a_real_sabnzbd_and_rolled_back(platform: Platform, tmp_path: Path) -> None:
    with real_services.sabnzbd(tmp_path) as sabnzbd:

        def value() -> int:
            query = {"mode": "get_config", "section": "misc", "output": "json", "apikey": sabnzbd.key}
            response = platform.http.get(f"{sabnzbd.url}/api", params=query)
            return response.json()["config"]["misc"][SETTING]

        service = {"name": "Usenet", "type": "sabnzbd", "url": sabnzbd.url, "api_key": sabnzbd.key}
        post(platform, "/api/services", service)
        audit = post(platform, f"{CONFIG}/audit", {"services": ["sabnzbd"], "include_web_search": False})
        assert (audit["status"], audit["services_audited"]) == ("succeeded", ["sabnzbd"])
        page = platform.http.get(f"{CONFIG}/recommendations", params={"page_size": 100}).json()
        (recommendation,) = [item for item in page["recommendations"] if item["setting_name"] == SETTING]
        assert (recommendation["current_value"], recommendation["recommended_value"], value()) == (1, 2, 1)

        ids = {"recommendation_ids": [recommendation["id"]]}
        (dry_run,) = post(platform, f"{CONFIG}/apply", {**ids, "dry_run": True})["results"]
        assert (dry_run["success"], dry_run["changed"], value()) == (True, False, 1)
        (applied,) = post(platform, f"{CONFIG}/apply", ids)["results"]
        assert (applied["success"], applied["rollback_available"], value()) == (True, True, 2)
        (rolled_back,) = post(platform, f"{CONFIG}/rollback", ids)["results"]
        assert (rolled_back["success"], rolled_back["new_value"], value()) == (True, 1, 1)


def post(platform: Platform, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = platform.http.post(path, json=body)
    assert response.is_success, response.text
    return response.json()
