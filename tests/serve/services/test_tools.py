"""/api/v1/mcp: the tools of services, access to them, their arguments, and the record of calls."""

import os
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import update

from cluster.db import now
from cluster.ownership import LOCAL
from cluster.services import store as service_store
from cluster.services.capabilities.downloads import DownloadQueue
from cluster.services.catalog import all_connectors
from cluster.services.tool_source import find_tool_source
from cluster.services.tools import tool_parameters
from cluster.tools import ToolContext
from pipelines.tools.calls import ToolCall, remove_old_calls
from tests.support.api_client import ApiClient
from tests.support.services import news_server, real_services
from tests.support.services.fake_services import FAKE_SERVICES, KEY
from tests.support.services.news_server import NewsServer
from tests.support.services.real_services import RunningService
from tests.support.services.stub_server import StubRequest, StubResponse, StubServer, json_response, stub_server
from tests.support.waiting import eventually_async

MCP = "/api/v1/mcp"
UNREACHABLE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def sabnzbd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with real_services.sabnzbd(tmp_path_factory.mktemp("sabnzbd")) as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with (
        real_services.node_exporter(tmp_path_factory.mktemp("node")) as node,
        real_services.prometheus(tmp_path_factory.mktemp("prometheus"), node) as running,
    ):
        yield running


@pytest.fixture
async def server() -> AsyncIterator[StubServer]:
    """A SABnzbd whose queue is empty. It sends the same response to every request."""
    queue = {"slots": [], "paused": False, "status": "Idle", "kbpersec": "0.00", "mbleft": "0.00"}
    async with stub_server(lambda _: json_response({"queue": queue})) as server:
        yield server


async def connect(api: ApiClient, type: str, url: str, key: str | None = KEY, **values: Any) -> None:  # noqa: A002
    async with api.database.transaction() as session:
        await service_store.create(session, {"name": type, "type": type, "url": url, "api_key": key, **values}, "ada")


async def call(api: ApiClient, server: str, tool: str, username: str = "admin", **arguments: Any) -> tuple[int, Any]:
    response = await api.request(username, "POST", f"{MCP}/{server}/call", json={"tool": tool, "arguments": arguments})
    return response.status_code, response.json()


async def list_calls(api: ApiClient, **parameters: Any) -> list[dict[str, Any]]:
    response = await api.request("admin", "GET", f"{MCP}/calls", params=parameters)
    assert response.status_code == 200, response.text
    return response.json()["items"]


def names_in_queue(sabnzbd: RunningService) -> list[str]:
    return [slot["filename"] for slot in news_server.call_api(sabnzbd, "queue")["queue"]["slots"]]


async def test_the_tools_of_sabnzbd_are_listed(api: ApiClient) -> None:
    await connect(api, "sabnzbd", UNREACHABLE)
    body = (await api.request("ada", "GET", f"{MCP}/sabnzbd/tools")).json()
    assert body["server"] == "sabnzbd"
    tools = {tool["name"]: tool for tool in body["tools"]}
    assert tools["get_queue"] == {
        "name": "get_queue",
        "description": "Get current download queue",
        "effect": "read",
        "parameters": {},
    }
    limit = tools["get_history"]["parameters"]["limit"]
    assert (limit["type"], limit["description"], limit["default"]) == ("integer", "Maximum items to return", 50)
    assert "required" not in limit
    assert tools["retry_download"]["parameters"]["nzo_id"]["required"] is True
    effects = {name: tool["effect"] for name, tool in tools.items()}
    assert (effects["pause_queue"], effects["delete_download"]) == ("change", "destroy")


def test_every_tool_has_a_description_and_a_schema() -> None:
    for connector in all_connectors().values():
        names = [tool.name for tool in connector.tools]
        assert len(names) == len(set(names))
        for tool in connector.tools:
            assert tool.description
            schema = tool.arguments.model_json_schema()
            assert (schema["type"], schema["additionalProperties"]) == ("object", False)


async def test_the_tools_of_a_service_are_described_for_any_caller(api: ApiClient) -> None:
    for type_, connector in all_connectors().items():
        await connect(api, type_, UNREACHABLE, KEY if connector.needs_key else None)
        if not connector.tools:
            continue
        async with api.database.read_transaction() as session:
            source = await find_tool_source(session, type_)
        assert (source.name, len(source.tools)) == (type_, len(connector.tools))
        for tool in source.tools:
            assert tool.input_schema["type"] == "object"
            for name, parameter in tool_parameters(tool).items():
                assert {"type", "description"} <= parameter.keys(), (type_, tool.name, name)
            assert tool.output_schema is None or tool.output_schema["type"] == "object"
    async with api.database.read_transaction() as session:
        source = await find_tool_source(session, "sabnzbd")
    assert source.find("get_queue").output_schema == DownloadQueue.model_json_schema(mode="serialization")


async def test_a_handler_returns_the_described_result(api: ApiClient, server: StubServer) -> None:
    await connect(api, "sabnzbd", server.url)
    async with api.database.read_transaction() as session:
        tool = (await find_tool_source(session, "sabnzbd")).find("get_queue")
    result = await tool.handler(ToolContext(api.database, LOCAL), tool.arguments())
    assert isinstance(result, DownloadQueue)
    assert (result.queue, result.paused) == ([], False)


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_tools_of_a_real_sabnzbd(api: ApiClient, sabnzbd: RunningService) -> None:
    await connect(api, "sabnzbd", sabnzbd.url, sabnzbd.key)
    status, paused = await call(api, "sabnzbd", "pause_queue")
    assert (status, paused["result"]) == (200, {"success": True, "paused": True, "queue_status": "Paused"})
    assert paused["execution_time_ms"] > 0
    assert news_server.call_api(sabnzbd, "queue")["queue"]["paused"] is True
    status, queue = await call(api, "sabnzbd", "get_queue", "ada")
    assert (status, queue["result"]["paused"], queue["result"]["speed"]) == (200, True, "0 B/s")
    assert (await call(api, "sabnzbd", "resume_queue"))[1]["result"]["paused"] is False
    added = (await call(api, "sabnzbd", "add_download", url=f"{UNREACHABLE}/x.nzb&i=1&r=hidden", name="Film"))[1][
        "result"
    ]
    (slot,) = (await call(api, "sabnzbd", "get_queue"))[1]["result"]["queue"]
    assert (slot["nzo_id"], slot["status"], slot["priority"]) == (added["nzo_id"], "Grabbing", "Normal")
    # Some releases of SABnzbd name it at once, others show its address first.
    assert slot["filename"] == "Film" or slot["filename"].endswith(f"{UNREACHABLE}/…")
    assert (await call(api, "sabnzbd", "delete_download", **added))[0] == 200
    nzb = NewsServer().post("film.mkv", b"film")
    async with stub_server(lambda request: StubResponse(nzb.encode(), 200, "application/x-nzb")) as web:
        added = (await call(api, "sabnzbd", "add_download", url=f"{web.url}/x.nzb", name="Film"))[1]["result"]
        await eventually_async(lambda: names_in_queue(sabnzbd) == ["Film"])
    status, history = await call(api, "sabnzbd", "get_history", "ada", limit=1)
    assert (status, history["result"]) == (200, {"history": [], "total": 0})
    assert (await call(api, "sabnzbd", "delete_download", **added))[1]["result"] == added
    assert names_in_queue(sabnzbd) == []
    status, body = await call(api, "sabnzbd", "delete_download", **added)
    assert (status, body["error_code"]) == (404, "DOWNLOAD_NOT_FOUND")
    records = await list_calls(api)
    assert [(record["tool"], record["called_by"], record["outcome"]) for record in records] == [
        ("delete_download", "admin", "failed"),
        ("delete_download", "admin", "succeeded"),
        ("get_history", "ada", "succeeded"),
        ("add_download", "admin", "succeeded"),
        ("delete_download", "admin", "succeeded"),
        ("get_queue", "admin", "succeeded"),
        ("add_download", "admin", "succeeded"),
        ("resume_queue", "admin", "succeeded"),
        ("get_queue", "ada", "succeeded"),
        ("pause_queue", "admin", "succeeded"),
    ]
    assert (records[0]["error_code"], records[2]["arguments"]) == ("DOWNLOAD_NOT_FOUND", {"limit": 1})
    # Any part of an address may be a key.
    assert records[6]["arguments"] == {"url": f"{UNREACHABLE}/…", "name": "Film"}
    assert records[-1]["execution_time_ms"] == paused["execution_time_ms"]


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_queries_of_a_real_prometheus(api: ApiClient, prometheus: RunningService) -> None:
    await connect(api, "prometheus", prometheus.url, None)
    status, body = await call(api, "prometheus", "query_metrics", "ada", query="1 + 1")
    assert (status, body["result"]["resultType"], body["result"]["result"][1]) == (200, "scalar", "2")
    cores = 'count(last_over_time(node_cpu_seconds_total{mode="idle"}[1h]))'  # a slow scrape makes the last value stale
    status, body = await call(api, "prometheus", "query_metrics", "ada", query=cores)
    assert int(body["result"]["result"][0]["value"][1]) == os.cpu_count()
    status, body = await call(api, "prometheus", "query_metrics", "ada", query="up{")
    assert (status, body["error_code"]) == (400, "REFUSED_BY_SERVICE")


@pytest.mark.parametrize(
    ("tool", "arguments", "field"),
    [
        ("get_history", {"limit": 0}, "limit"),
        ("get_history", {"limit": "20"}, "limit"),
        ("get_history", {"limit": 2**64 - 1}, "limit"),
        ("get_history", {"limit": None}, "limit"),
        ("get_history", {"limits": 3}, "limits"),
        ("get_queue", {"nzo_id": "x"}, "nzo_id"),
        ("retry_download", {}, "nzo_id"),
        ("retry_download", {"nzo_id": ["x"]}, "nzo_id"),
        ("add_download", {"url": "file:///etc/passwd"}, "url"),
    ],
)
async def test_invalid_arguments_are_refused(
    api: ApiClient, server: StubServer, tool: str, arguments: dict[str, Any], field: str
) -> None:
    await connect(api, "sabnzbd", server.url)
    status, body = await call(api, "sabnzbd", tool, **arguments)
    assert (status, body["error"], body["error_code"]) == (400, "invalid_request", "INVALID_TOOL_ARGUMENTS")
    assert (list(body["details"]), field in body["message"]) == ([field], True)
    assert server.requests == []
    (record,) = await list_calls(api)
    assert (record["outcome"], record["arguments"], record["execution_time_ms"]) == ("refused", arguments, None)


async def test_tools_that_change_something_are_for_administrators(api: ApiClient, server: StubServer) -> None:
    await connect(api, "sabnzbd", server.url)
    for tool in ("pause_queue", "delete_download", "retry_download"):
        status, body = await call(api, "sabnzbd", tool, "ada", nzo_id="x")
        assert (status, body["error"]) == (403, "forbidden")
    assert server.requests == []
    assert (await call(api, "sabnzbd", "get_queue", "ada"))[0] == 200
    assert [record["outcome"] for record in await list_calls(api)] == ["succeeded", "refused", "refused", "refused"]
    assert (await api.request("ada", "GET", f"{MCP}/calls")).status_code == 403


async def test_unknown_tools_and_services_are_not_found(api: ApiClient, server: StubServer) -> None:
    await connect(api, "sabnzbd", server.url)
    status, body = await call(api, "sabnzbd", "shut_down")
    assert (status, body["error_code"]) == (404, "UNKNOWN_TOOL")
    assert "get_queue, get_history" in body["message"]
    for name, expected in (("nobody", 404), ("plex", 503)):
        assert (await call(api, name, "get_queue"))[0] == expected
        assert (await api.request("ada", "GET", f"{MCP}/{name}/tools")).status_code == expected
    assert [record["tool"] for record in await list_calls(api)] == ["shut_down"]


async def test_an_unreachable_service_has_the_documented_error(api: ApiClient) -> None:
    await connect(api, "sabnzbd", UNREACHABLE)
    status, body = await call(api, "sabnzbd", "get_queue")
    assert (status, body["error"], body["error_code"]) == (503, "mcp_connection_error", "SERVICE_UNREACHABLE")
    assert (await list_calls(api))[0]["outcome"] == "failed"


async def test_secrets_and_long_arguments_are_not_stored(api: ApiClient, server: StubServer) -> None:
    await connect(api, "sabnzbd", server.url)
    await call(api, "sabnzbd", "get_queue", api_key="sesame", deep=[{"password": {"is": "sesame"}}], say="token=sesame")
    await call(api, "sabnzbd", "get_queue", text=20_000 * "x")
    long, secret = await list_calls(api)
    assert "sesame" not in str(secret)
    assert secret["arguments"]["deep"] == [{"password": "********"}]
    assert long["arguments"] == {"omitted": "20012 characters"}


@pytest.mark.parametrize("value", ["NaN", "1e999", 900 * "[" + 900 * "]", '"\\ud800"'])
async def test_arguments_that_cannot_be_stored_are_refused(api: ApiClient, server: StubServer, value: str) -> None:
    await connect(api, "sabnzbd", server.url)
    content = '{"tool": "get_queue", "arguments": {"x": ' + value + "}}"
    response = await api.request("admin", "POST", f"{MCP}/sabnzbd/call", content=content)
    assert response.status_code in {400, 422}, response.text


async def test_calls_are_paginated_filtered_and_removed(api: ApiClient, server: StubServer) -> None:
    await connect(api, "sabnzbd", server.url)
    await connect(api, "plex", UNREACHABLE)
    for _ in range(3):
        await call(api, "sabnzbd", "get_queue")
    await call(api, "plex", "get_libraries")
    assert len(await list_calls(api, limit=2)) == 2
    assert [record["tool"] for record in await list_calls(api, service="plex")] == ["get_libraries"]
    async with api.database.transaction() as session:
        old = update(ToolCall).where(ToolCall.service == "plex").values(at=now() - timedelta(days=31))
        await session.execute(old)
    assert await remove_old_calls(api.database) == 1
    assert len(await list_calls(api)) == 3


# Other services: a fake of each, with a response as its API documents it.

RESPONSES: dict[str, tuple[str, str, dict[str, Any], Any, Any]] = {
    "prowlarr": (
        "get_indexers",
        "/api/v1/indexer",
        {},
        [{"id": 1, "name": "NZB", "protocol": "usenet", "privacy": "private", "enable": True, "priority": 25}],
        [{"id": 1, "name": "NZB", "protocol": "usenet", "privacy": "private", "enable": True, "priority": 25}],
    ),
    "overseerr": (
        "get_requests",
        "/api/v1/request",
        {"limit": 5},
        {
            "pageInfo": {"results": 1},
            "results": [{"id": 3, "type": "movie", "status": 2, "media": {"tmdbId": 603}, "requestedBy": {"id": 1}}],
        },
        [
            {
                "id": 3,
                "type": "movie",
                "status": 2,
                "createdAt": None,
                "media": {"tmdbId": 603, "tvdbId": None, "status": None},
                "requestedBy": {"displayName": None},
            }
        ],
    ),
    "ollama": (
        "get_models",
        "/api/tags",
        {},
        {"models": [{"name": "qwen3:8b", "size": 5_200_000_000, "digest": "a"}]},
        [{"name": "qwen3:8b", "size": 5_200_000_000}],
    ),
    "qdrant": (
        "get_collections",
        "/collections",
        {},
        {"result": {"collections": [{"name": "docs"}]}, "status": "ok", "time": 0.1},
        [{"name": "docs"}],
    ),
    "searxng": (
        "search_web",
        "/search",
        {"query": "sabnzbd", "limit": 1},
        {"query": "sabnzbd", "results": [{"url": "https://a.example", "title": "A"}, {"url": "https://b.example"}]},
        [{"url": "https://a.example", "title": "A", "content": None}],
    ),
    "bazarr": (
        "get_wanted",
        "/api/episodes/wanted",
        {},
        {
            "data": [{"seriesTitle": "Lost", "episode_number": "1x01", "missing_subtitles": [{"code2": "en"}]}],
            "total": 1,
        },
        {
            "data": [
                {
                    "seriesTitle": "Lost",
                    "episode_number": "1x01",
                    "episodeTitle": None,
                    "missing_subtitles": [{"code2": "en"}],
                }
            ],
            "total": 1,
        },
    ),
    "jellyfin": (
        "get_activity",
        "/Sessions",
        {},
        [{"UserName": "ada", "NowPlayingItem": {"Name": "Pilot", "Type": "Episode"}}, {"UserName": "bob"}],
        [
            {
                "UserName": "ada",
                "Client": None,
                "DeviceName": None,
                "NowPlayingItem": {"Name": "Pilot", "SeriesName": None, "Type": "Episode"},
            }
        ],
    ),
    "qbittorrent": (
        "get_torrents",
        "/api/v2/torrents/info",
        {"limit": 1},
        [
            {
                "hash": "ab",
                "name": "Debian 🐧",
                "state": "downloading",
                "progress": 0.5,
                "size": 9,
                "dlspeed": 1,
                "eta": None,
            }
        ],
        [
            {
                "hash": "ab",
                "name": "Debian 🐧",
                "state": "downloading",
                "progress": 0.5,
                "size": 9,
                "dlspeed": 1,
                "eta": None,
                "category": None,
            }
        ],
    ),
    "proxmox": (
        "get_machines",
        "/api2/json/cluster/resources",
        {},
        {"data": [{"vmid": 100, "name": "nas", "node": "pve", "type": "qemu", "status": "running", "cpu": 0.1}]},
        [
            {
                "vmid": 100,
                "name": "nas",
                "node": "pve",
                "type": "qemu",
                "status": "running",
                "cpu": 0.1,
                "maxcpu": None,
                "mem": None,
                "maxmem": None,
                "uptime": None,
            }
        ],
    ),
    "tautulli": (
        "get_activity",
        "/api/v2",
        {},
        {"response": {"result": "success", "message": None, "data": {"sessions": [{"full_title": "The Matrix"}]}}},
        [
            {
                "user": None,
                "full_title": "The Matrix",
                "media_type": None,
                "state": None,
                "progress_percent": None,
                "player": None,
                "transcode_decision": None,
            }
        ],
    ),
}


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
@pytest.mark.parametrize("name", RESPONSES)
async def test_tools_of_other_services(api: ApiClient, name: str) -> None:
    tool, path, arguments, content, expected = RESPONSES[name]
    fake = FAKE_SERVICES[name]
    malformed = False

    def respond(request: StubRequest) -> StubResponse:
        reply = fake(request)
        if request.path != path or reply.status in {401, 403}:
            return reply
        return json_response({"results": 7, "data": "?", "response": {"data": 1}} if malformed else content)

    async with stub_server(respond) as server:
        await connect(api, name, server.url, fake.key if fake.requires_key else None)
        status, result = await call(api, name, tool, "ada", **arguments)
        assert (status, result.get("result")) == (200, expected), result
        malformed = True
        status, result = await call(api, name, tool, "ada", **arguments)
        assert (status, result["error_code"]) == (503, "SERVICE_BAD_RESPONSE")
