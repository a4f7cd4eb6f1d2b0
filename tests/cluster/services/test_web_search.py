"""Web search with Debian's searx, whose only engine is a stub."""

from pathlib import Path

import pytest

from cluster.services import health_checks
from cluster.services.catalog import find_connector
from cluster.services.errors import BadResponse
from cluster.services.http.client import Client
from cluster.services.http.connection import Connection
from cluster.services.web_search import SearchResult
from tests.support.services import real_services
from tests.support.services.stub_server import json_response, stub_server

pytestmark = pytest.mark.usefixtures("home")

RESULTS = [{"title": "A guide", "url": "https://guide.example/a"}, {"title": "B", "url": "ftp://guide.example/b"}]


@pytest.mark.deep
async def test_a_search_returns_pages(tmp_path: Path) -> None:
    connector = find_connector("searxng")
    assert connector.search_web
    async with stub_server(lambda request: json_response({"results": RESULTS})) as engine:
        with real_services.searx(tmp_path, engine.url) as running:
            async with Client(Connection("Ours", connector, running.url)).open() as client:
                assert await health_checks.get_version(client, connector)
                results = await connector.search_web(client, "what is 1 & 1?")
    assert results == [SearchResult("A guide", "https://guide.example/a", "A guide")]
    assert engine.requests[0].query["q"] == "what is 1 & 1?"


@pytest.mark.parametrize("body", [{}, [], {"results": None}, {"results": [{"title": "no address"}]}])
async def test_an_invalid_response_is_an_error(body: object) -> None:
    connector = find_connector("searxng")
    assert connector.search_web
    async with stub_server(lambda request: json_response(body)) as server:
        async with Client(Connection("Ours", connector, server.url)).open() as client:
            with pytest.raises(BadResponse, match="something unexpected"):
                await connector.search_web(client, "x")
        assert client.failures == 1
