"""Connectors with real services: Debian's SABnzbd and Prometheus."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.services import health_checks
from cluster.services.catalog import find_connector
from cluster.services.errors import Refused, ServiceError, Unauthorized
from cluster.services.http.client import Client
from cluster.services.http.connection import Connection
from tests.support.services import news_server, real_services
from tests.support.services.real_services import RunningService

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture(scope="module")
def sabnzbd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with real_services.sabnzbd(tmp_path_factory.mktemp("sabnzbd")) as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with real_services.prometheus(tmp_path_factory.mktemp("prometheus")) as running:
        yield running


async def get_version(name: str, url: str, key: str | None = None) -> str:
    connector = find_connector(name)
    async with Client(Connection("Ours", connector, url, key)).open() as client:
        return await health_checks.get_version(client, connector)


async def test_sabnzbd_returns_its_version(sabnzbd: RunningService) -> None:
    url, key = sabnzbd.url, sabnzbd.key
    assert (await get_version("sabnzbd", url, key))[:2] in {"3.", "4.", "5."}
    assert await get_version("sabnzbd", f"{url}/sabnzbd", key) == await get_version("sabnzbd", url, key)


@pytest.mark.parametrize(("key", "message"), [(None, "API Key Required"), ("wrong", "API Key Incorrect")])
async def test_sabnzbd_refuses_a_wrong_key(sabnzbd: RunningService, key: str | None, message: str) -> None:
    with pytest.raises(Unauthorized, match=message):
        await get_version("sabnzbd", sabnzbd.url, key)


async def test_an_error_of_sabnzbd_with_status_200_is_an_error(sabnzbd: RunningService) -> None:
    url, key = sabnzbd.url, sabnzbd.key
    async with Client(Connection("Ours", find_connector("sabnzbd"), url, key)).open() as client:
        with pytest.raises(Refused, match="item does not exist"):
            await client.get("/api", mode="retry", output="json", value="SABnzbd_nzo_none")


async def test_sabnzbd_at_the_address_of_sonarr_is_named(sabnzbd: RunningService) -> None:
    sonarr = find_connector("sonarr")
    connection = Connection("Ours", sonarr, sabnzbd.url, "0123456789")
    with pytest.raises(ServiceError) as refused:
        await get_version("sonarr", sabnzbd.url, "0123456789")
    error = await health_checks.diagnose(refused.value, connection, sonarr)
    assert error.message == "SABnzbd answers at the address of Ours, not Sonarr."


@pytest.mark.deep
async def test_prometheus_returns_its_version_and_its_errors(prometheus: RunningService) -> None:
    assert (await get_version("prometheus", prometheus.url))[0] in "23"
    async with Client(Connection("Ours", find_connector("prometheus"), prometheus.url)).open() as client:
        with pytest.raises(Refused, match="parse error"):
            await client.get("/api/v1/query", query="up{")
        assert (await client.get("/api/v1/query", query="1 + 1"))["result"][1] == "2"


def test_downloads_complete_and_fail(sabnzbd: RunningService) -> None:
    content = secrets.token_bytes(300_000)
    with news_server.running_news_server() as news:
        news_server.add_news_server(sabnzbd, news)
        nzo_id = news_server.add_download(sabnzbd, news.post("film.mkv", content), "Whole")
        completed = news_server.finished_download(sabnzbd, nzo_id)
        failed = news_server.finished_download(
            sabnzbd, news_server.add_download(sabnzbd, news.post("film.mkv", content[1:], lost=4), "Lost")
        )
    assert (completed["status"], Path(completed["storage"]).read_bytes()) == ("Completed", content)
    assert (failed["status"], failed["retry"]) == ("Failed", 1)
    assert "Not on your server" in failed["fail_message"]
