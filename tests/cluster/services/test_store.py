"""The store of services: names, sealed keys, and services that the settings declare."""

from typing import Any

import pytest
from sqlalchemy import select, text

from cluster.db import Database
from cluster.errors import SettingsError
from cluster.services import health_checks
from cluster.services import store as service_store
from cluster.services.circuit_breaker import Circuit
from cluster.services.health_checks import ServiceCheck
from cluster.services.http.urls import InvalidServiceUrl
from cluster.services.store import (
    InvalidServiceKey,
    KeyMustBeResent,
    MisleadingName,
    Service,
    ServiceDeclared,
    ServiceNameTaken,
    ServiceNotFound,
)
from cluster.settings import get_settings, load_settings
from jobs.tables import Job, Schedule
from pipelines.media.check_services import declare_services
from tests.cluster.services.conftest import Add
from tests.support.services.fake_services import FAKE_SERVICES, KEY
from tests.support.services.stub_server import stub_server

URL = "http://127.0.0.1:9"


async def change(database: Database, service: Service, **values: Any) -> Service:
    async with database.transaction() as session:
        fresh = await service_store.get(session, service.id, lock=True)
        await service_store.change(session, fresh, values)
        return fresh


async def test_a_key_is_sealed_in_the_database(database: Database, add: Add) -> None:
    service = await add(URL, api_key=KEY)
    async with database.read_transaction() as session:
        rows = [*await session.execute(text("SELECT * FROM services"))]
    assert KEY not in str(rows)
    connection = service_store.connection_of(service)
    assert connection.key == KEY
    assert KEY not in repr(connection)


@pytest.mark.parametrize("name", ["sonarr", "Sonarr", "Our Sonarr"])
async def test_names_are_unique_without_regard_to_case(database: Database, add: Add, name: str) -> None:
    await add(URL, name=name)
    other = await add(URL, "radarr")
    for taken in (name, name.upper()):
        with pytest.raises(ServiceNameTaken):
            await add(URL, name=taken)
        with pytest.raises((ServiceNameTaken, MisleadingName)):
            await change(database, other, name=taken)
    async with database.read_transaction() as session:
        assert [service.name for service in await service_store.list_services(session)] == [name, "Our radarr"]


async def test_a_service_cannot_have_the_name_of_another_type(add: Add) -> None:
    for name in ("Radarr", "jellyseerr"):
        with pytest.raises(MisleadingName):
            await add(URL, name=name)


async def test_a_type_resolves_to_the_service_with_that_name_or_the_first_one(database: Database, add: Add) -> None:
    first = await add(URL, name="TV")
    second = await add(URL, name="Sonarr 4K 🎬")
    overseerr = await add(URL, "jellyseerr", name="Wishes")

    async def find(name: str) -> Service | None:
        async with database.read_transaction() as session:
            return await service_store.find(session, name)

    async def find_id(name: str) -> int | None:
        return (service := await find(name)) and service.id

    assert overseerr.type == "overseerr"
    assert [await find_id(name) for name in ("sonarr", "SONARR", "tv")] == [first.id] * 3
    assert await find_id("sonarr 4k 🎬") == second.id
    assert [await find_id(name) for name in ("overseerr", "seerr", "wishes")] == [overseerr.id] * 3
    assert await find("plex") is None
    with pytest.raises(ServiceNotFound):
        await find("nothing")
    await change(database, first, enabled=False)
    assert await find_id("sonarr") == second.id
    third = await add(URL, name="sonarr")
    assert await find_id("sonarr") == third.id


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"url": "http://169.254.169.254/latest"}, InvalidServiceUrl),
        ({"api_key": "two\r\nlines"}, InvalidServiceKey),
        ({"api_key": "schlüssel"}, InvalidServiceKey),
        ({"type": "searxng", "api_key": "what for"}, InvalidServiceKey),
    ],
)
async def test_an_invalid_change_is_refused(
    database: Database, add: Add, values: dict[str, Any], error: type[Exception]
) -> None:
    service = await add(URL, api_key=KEY)
    with pytest.raises(error):
        await change(database, service, **values)
    async with database.read_transaction() as session:
        stored = await service_store.get(session, service.id)
        assert (stored.url, stored.type, service_store.connection_of(stored).key) == (URL, "sonarr", KEY)


async def test_a_key_is_not_sent_to_a_new_address(database: Database, add: Add) -> None:
    service = await add(f"{URL}/sonarr", api_key=KEY)
    for other in ({"url": "http://127.0.0.1:10/sonarr"}, {"url": "https://127.0.0.1:9/sonarr"}, {"type": "radarr"}):
        with pytest.raises(KeyMustBeResent):
            await change(database, service, **other)
    assert (await change(database, service, url=f"{URL}/tv")).url == f"{URL}/tv"
    moved = await change(database, service, url="http://127.0.0.1:10", api_key="another")
    assert service_store.connection_of(moved).key == "another"


async def test_a_check_is_invalid_after_a_change_of_the_connection(database: Database, add: Add) -> None:
    async with stub_server(FAKE_SERVICES["sonarr"]) as server:
        service = await add(server.url, api_key=KEY)
        await health_checks.check(database, service)
        async with database.read_transaction() as session:
            assert (await health_checks.last_checks(session))[service.id].healthy
        await change(database, service, name="TV")
        async with database.read_transaction() as session:
            assert service.id in await health_checks.last_checks(session)
        await change(database, service, api_key="another")
        async with database.read_transaction() as session:
            assert await health_checks.last_checks(session) == {}
        async with database.transaction() as session:
            await service_store.delete(session, await service_store.get(session, service.id))
    async with database.read_transaction() as session:
        assert [*await session.scalars(select(ServiceCheck))] == [*await session.scalars(select(Circuit))] == []


# Services declared in the settings


async def declare(database: Database, monkeypatch: pytest.MonkeyPatch, declared: str) -> list[Service]:
    monkeypatch.setenv("FORGEARR_SERVICES__DECLARED", declared)
    get_settings.cache_clear()
    await declare_services(database)
    async with database.read_transaction() as session:
        return [*await service_store.list_services(session)]


async def test_declared_services_change_only_through_the_settings(
    database: Database, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = await add(URL, "radarr")
    line = f"{{name: TV, type: sonarr, url: '{URL}', api_key: {KEY}}}"
    _, tv = await declare(database, monkeypatch, f"[{line}]")
    assert (tv.name, tv.declared, tv.created_by, service_store.connection_of(tv).key) == ("TV", True, "settings", KEY)
    with pytest.raises(ServiceDeclared):
        await change(database, tv, enabled=False)
    async with database.transaction() as session:
        with pytest.raises(ServiceDeclared):
            await service_store.delete(session, await service_store.get(session, tv.id))
    _, same = await declare(database, monkeypatch, f"[{line}]")
    assert (same.id, same.connected_as_of) == (tv.id, tv.connected_as_of)
    _, moved = await declare(database, monkeypatch, f"[{line.replace(':9', ':10')}]")
    assert (moved.id, moved.url, moved.connected_as_of > tv.connected_as_of) == (tv.id, "http://127.0.0.1:10", True)
    assert [service.id for service in await declare(database, monkeypatch, "[]")] == [own.id]
    async with database.read_transaction() as session:
        jobs = [*await session.scalars(select(Job.spec))]
        assert jobs == 4 * [{"service_id": None}]  # each start queues a check of all services
        kinds = await session.scalars(select(Schedule.kind).order_by(Schedule.kind))
        assert [*kinds] == ["check_services", "watch_downloads"]


async def test_a_declared_service_replaces_one_with_the_same_name(
    database: Database, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = await add(URL, api_key=KEY)
    (service,) = await declare(database, monkeypatch, f"[{{name: Our sonarr, type: sonarr, url: '{URL}'}}]")
    assert (service.id, service.declared, service.api_key) == (own.id, True, None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{name: TV, type: sonarr, url: 'http://tv', api_key: ''}", "api_key: .*at least 1"),
        ("{name: TV, type: sonar, url: 'http://tv'}", "invalid service 'TV': There is no type"),
        ("{name: TV, type: sonarr, url: 'http://169.254.169.254'}", "No service may have the address"),
        ("{name: TV, type: sonarr, url: 'http://a'}, {name: tv, type: sonarr, url: 'http://b'}", "already a service"),
    ],
)
async def test_an_invalid_declaration_prevents_the_start(
    database: Database, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        await declare(database, monkeypatch, f"[{line}]")


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("DECLARED", f"[{{name: TV, api_key: {KEY}}}]"),
        ("DECLARED", f"[{{name: TV, type: sonarr, url: 'http://a', key: {KEY}}}]"),
        ("DECLARD", f"[{{name: TV, type: sonarr, url: 'http://a', api_key: {KEY}}}]"),
    ],
)
def test_errors_about_invalid_declarations_hide_the_key(
    monkeypatch: pytest.MonkeyPatch, setting: str, value: str
) -> None:
    monkeypatch.setenv(f"FORGEARR_SERVICES__{setting}", value)
    with pytest.raises(SettingsError) as refused:
        load_settings()
    assert KEY not in refused.value.message


@pytest.mark.usefixtures("home")
def test_keys_of_declared_services_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"[{{name: TV, type: sonarr, url: 'http://a', api_key: {KEY}}}]"
    monkeypatch.setenv("FORGEARR_SERVICES__DECLARED", line)
    shown = {key: value for key, value, _ in load_settings().rows()}
    assert KEY not in str(shown)
    assert "name: TV" in shown["services.declared"]
