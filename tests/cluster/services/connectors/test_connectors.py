"""All connectors with fakes of their services: versions, keys, and confusion with other services."""

import json

import pytest

from cluster.services import health_checks
from cluster.services.catalog import UnknownServiceType, all_connectors, find_connector
from cluster.services.errors import ServiceError, Unauthorized, WrongService
from cluster.services.http.client import Client
from cluster.services.http.connection import Connection
from tests.support.services.fake_services import FAKE_SERVICES, KEY
from tests.support.services.openapi_documents import check_response
from tests.support.services.stub_server import html_page, stub_server

WITH_KEY = [name for name, fake in FAKE_SERVICES.items() if fake.requires_key]


@pytest.fixture(autouse=True)
def settings(home: object) -> None:
    """A client needs the setting of its timeout."""


async def get_version(url: str, name: str, key: str | None) -> str:
    connector = find_connector(name)
    connection = Connection("Ours", connector, url, key)
    try:
        async with Client(connection).open() as client:
            return await health_checks.get_version(client, connector)
    except ServiceError as error:
        raise await health_checks.diagnose(error, connection, connector) from error


def test_every_service_has_a_connector_and_a_fake() -> None:
    assert all_connectors().keys() == FAKE_SERVICES.keys()
    assert all("health" in connector.capabilities for connector in all_connectors().values())


def test_the_capabilities_of_a_connector_are_implemented() -> None:
    for connector in all_connectors().values():
        capabilities = connector.capabilities
        assert ("configure" in capabilities) == (connector.settings is not None), connector.type
        assert ("library" in capabilities) == bool(connector.library or connector.collection), connector.type
        assert ("history" in capabilities) == bool(connector.downloads or connector.download_tracker), connector.type
        assert ("web_search" in capabilities) == (connector.search_web is not None), connector.type
        assert (capabilities > {"health"}) == bool(connector.tools), connector.type


def test_overseerr_has_the_names_of_its_forks() -> None:
    assert {find_connector(name).type for name in ("overseerr", "Jellyseerr", "SEERR")} == {"overseerr"}
    with pytest.raises(UnknownServiceType, match="sonarr"):
        find_connector("sonar")


@pytest.mark.parametrize("name", FAKE_SERVICES)
async def test_a_service_returns_its_version(name: str) -> None:
    fake = FAKE_SERVICES[name]
    async with stub_server(fake) as server:
        assert await get_version(server.url, name, fake.key if fake.requires_key else None) == fake.version


@pytest.mark.parametrize("name", WITH_KEY)
@pytest.mark.parametrize("key", [None, "ada:wrong-key-of-ours"])
async def test_a_wrong_key_has_its_own_error_and_is_not_shown(name: str, key: str | None) -> None:
    async with stub_server(FAKE_SERVICES[name]) as server:
        with pytest.raises(ServiceError) as refused:
            await get_version(server.url, name, key)
    assert refused.value.code == "SERVICE_UNAUTHORIZED"
    assert "wrong-key" not in refused.value.message


@pytest.mark.parametrize("name", FAKE_SERVICES)
async def test_another_service_is_rejected(name: str) -> None:
    """The error names the other service if its page has a title."""
    for other, fake in FAKE_SERVICES.items():
        if other == name:
            continue
        async with stub_server(fake) as server:
            with pytest.raises(ServiceError) as refused:
                await get_version(server.url, name, fake.key if fake.requires_key else None)
        assert refused.value.code in {"WRONG_SERVICE", "SERVICE_UNAUTHORIZED", "SERVICE_BAD_RESPONSE"}, other
        if fake.title:
            assert isinstance(refused.value, WrongService), other
            assert find_connector(other).title in refused.value.message


async def test_radarr_at_the_address_of_sonarr_is_named() -> None:
    async with stub_server(FAKE_SERVICES["radarr"]) as server:
        with pytest.raises(WrongService, match=r"^Radarr answers at the address of Ours, not Sonarr\.$"):
            await get_version(server.url, "sonarr", KEY)


async def test_the_key_is_not_sent_with_the_request_for_the_title_page() -> None:
    async with stub_server(lambda request: html_page("Login - Sonarr", 200 if request.path == "/" else 404)) as server:
        with pytest.raises(WrongService, match="Sonarr answers"):
            await get_version(server.url, "radarr", KEY)
    page_requests = [request for request in server.requests if request.path == "/"]
    assert len(page_requests) == 1
    assert KEY not in json.dumps(page_requests[0].headers)
    assert page_requests[0].headers["accept"] == "text/html"


async def test_a_login_is_followed_by_a_logout() -> None:
    async with stub_server(FAKE_SERVICES["qbittorrent"]) as server:
        await get_version(server.url, "qbittorrent", FAKE_SERVICES["qbittorrent"].key)
    assert [request.path.rpartition("/")[2] for request in server.requests] == [
        "login",
        "buildInfo",
        "version",
        "logout",
    ]
    assert server.requests[-1].headers["cookie"] == "SID=session"


async def test_qbittorrents_own_keys_need_no_login() -> None:
    fake = FAKE_SERVICES["qbittorrent"]
    async with stub_server(fake.answer) as server:
        assert await get_version(server.url, "qbittorrent", "qbt_" + 28 * "x") == fake.version
    assert {request.headers["authorization"] for request in server.requests} == {"Bearer qbt_" + 28 * "x"}


async def test_a_key_that_cannot_be_a_header_is_a_wrong_key() -> None:
    async with stub_server(FAKE_SERVICES["qbittorrent"].answer) as server:
        with pytest.raises(Unauthorized):
            await get_version(server.url, "qbittorrent", "qbt_ключ")


@pytest.mark.parametrize("name", ["sonarr", "radarr"])
async def test_the_fakes_match_the_official_documents(name: str) -> None:
    path = "/api/v3/system/status"
    async with stub_server(FAKE_SERVICES[name]) as server:
        client = Client(Connection("Ours", find_connector(name), server.url, KEY))
        async with client.open():
            check_response(name, path, await client.get(path))
