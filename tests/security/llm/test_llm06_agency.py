"""LLM06, excessive agency: what somebody wants to have done in the home through the tools that models are offered."""

import pytest

from cluster.services import store as service_store
from cluster.services.catalog import all_connectors
from tests.support.api_client import ApiClient
from tests.support.services.fake_services import KEY
from tests.support.services.stub_server import json_response, stub_server

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


async def test_change_something_with_any_tool_as_a_user(api: ApiClient) -> None:
    """Each tool that changes something, of each type of service, is refused before the service is asked."""
    tools = 0
    async with stub_server(lambda _: json_response({})) as home:
        for kind, connector in all_connectors().items():
            values = {"name": f"My {kind}", "type": kind, "url": home.url}
            async with api.database.transaction() as session:
                await service_store.create(
                    session, {**values, "api_key": KEY if connector.needs_key else None}, "admin"
                )
            for tool in connector.tools:
                if tool.effect == "read":
                    continue
                tools += 1
                body = {"tool": tool.name, "arguments": {}}
                refused = await api.request("ada", "POST", f"/api/v1/mcp/{kind}/call", json=body)
                assert (refused.status_code, refused.json()["error"]) == (403, "forbidden"), (kind, tool.name)
        assert home.requests == []
    assert tools > 10


async def test_queue_what_changes_the_home_as_a_user(api: ApiClient) -> None:
    specs = {"change_settings": {"action": "apply", "recommendation_ids": [1]}, "recover_downloads": {}}
    for kind, spec in specs.items():
        for path, more in (
            ("/api/v1/jobs", {}),
            ("/api/v1/schedules", {"name": "mine", "cron": "0 3 * * *"}),
        ):
            refused = await api.request("ada", "POST", path, json={"kind": kind, "spec": spec, **more})
            assert refused.status_code == 403, (kind, refused.text)
