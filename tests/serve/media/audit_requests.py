"""Requests of the audit tests, to Forgearr's API and to SABnzbd's."""

from typing import Any

import httpx

from cluster.services import store as service_store
from pipelines.media.audit import audit_services, change_settings
from tests.support import run_jobs
from tests.support.api_client import ApiClient
from tests.support.services.real_services import RunningService
from tests.support.waiting import TIMEOUT

PATH = "/api/v1/config"


async def add_service(api: ApiClient, name: str, type: str, url: str, key: str | None = None) -> int:  # noqa: A002
    async with api.database.transaction() as session:
        values = {"name": name, "type": type, "url": url, "api_key": key}
        return (await service_store.create(session, values, "ada")).id


def set_misc(program: RunningService, keyword: str, value: str) -> None:
    set_config(program, section="misc", keyword=keyword, value=value)


def set_config(program: RunningService, **values: str) -> None:
    query = {"mode": "set_config", **values}
    httpx.get(
        f"{program.url}/api", params={**query, "output": "json", "apikey": program.key}, timeout=TIMEOUT
    ).raise_for_status()


def get_config(program: RunningService, section: str = "misc") -> Any:
    query = {"mode": "get_config", "section": section, "output": "json", "apikey": program.key}
    return httpx.get(f"{program.url}/api", params=query, timeout=TIMEOUT).json()["config"][section]


async def run_audit(api: ApiClient, *services: str, **fields: Any) -> dict[str, Any]:
    body = {"services": list(services), "include_web_search": False, **fields}
    response = await run_jobs.request_and_run(api, f"{PATH}/audit", body, audit_services.KIND)
    assert response.status_code == 200, response.text
    return response.json()


async def run_change(api: ApiClient, action: str, *ids: int, dry_run: bool = False) -> list[dict[str, Any]]:
    body = {"recommendation_ids": list(ids), "dry_run": dry_run}
    response = await run_jobs.request_and_run(api, f"{PATH}/{action}", body, change_settings.KIND)
    assert response.status_code == 200, response.text
    result = response.json()
    good = sum(change["success"] for change in result["results"])
    assert result["summary"] == {"total": len(ids), "successful": good, "failed": len(ids) - good}
    assert result["dry_run"] is dry_run
    return result["results"]


async def get_recommendations(api: ApiClient, **query: Any) -> dict[str, dict[str, Any]]:
    response = await api.request("bob", "GET", f"{PATH}/recommendations", params={"page_size": 100, **query})
    assert response.status_code == 200, response.text
    return {
        f"{recommendation['item'] or ''}.{recommendation['setting_name']}".lstrip("."): recommendation
        for recommendation in response.json()["recommendations"]
    }
