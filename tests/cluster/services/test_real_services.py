"""Connectors with the real thing: Debian's SABnzbd and Prometheus, each with a folder of its own."""

import configparser
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from cluster.services import checks
from cluster.services.catalogue import find_connector
from cluster.services.client import Client, Connection
from cluster.services.errors import Refused, ServiceError, Unauthorised

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture(scope="module")
def sabnzbd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Its address and its key."""
    folder, address = tmp_path_factory.mktemp("sabnzbd"), _free_address()
    ini = folder / "sabnzbd.ini"
    with running(folder, address, "sabnzbdplus", "-f", str(ini), "-s", address, "-b", "0") as url:
        _wait_until_it_answers(f"{url}/api?mode=version&output=json", folder)
        # What stands before the first section is no INI to anybody else.
        settings = configparser.RawConfigParser(strict=False, interpolation=None)
        settings.read_string("[top]\n" + ini.read_text())
        yield url, settings["misc"]["api_key"]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, address = tmp_path_factory.mktemp("prometheus"), _free_address()
    (folder / "prometheus.yml").write_text("")
    options = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with running(folder, address, "prometheus", *options, f"--web.listen-address={address}") as url:
        _wait_until_it_answers(f"{url}/-/ready", folder)
        yield url


async def ask(name: str, url: str, key: str | None = None) -> str:
    async with Client(Connection("Ours", find_connector(name), url, key)).open() as client:
        return await checks.version_of(client)


async def test_sabnzbd_tells_its_version(sabnzbd: tuple[str, str]) -> None:
    url, key = sabnzbd
    assert (await ask("sabnzbd", url, key))[:2] in {"3.", "4.", "5."}
    assert await ask("sabnzbd", f"{url}/sabnzbd", key) == await ask("sabnzbd", url, key)


@pytest.mark.parametrize(("key", "words"), [(None, "API Key Required"), ("wrong", "API Key Incorrect")])
async def test_sabnzbd_wants_its_key(sabnzbd: tuple[str, str], key: str | None, words: str) -> None:
    with pytest.raises(Unauthorised, match=words):
        await ask("sabnzbd", sabnzbd[0], key)


async def test_sabnzbds_errors_come_with_status_200(sabnzbd: tuple[str, str]) -> None:
    url, key = sabnzbd
    async with Client(Connection("Ours", find_connector("sabnzbd"), url, key)).open() as client:
        with pytest.raises(Refused, match="item does not exist"):
            await client.get("/api", mode="retry", output="json", value="SABnzbd_nzo_none")


async def test_sabnzbd_is_seen_at_the_address_of_sonarr(sabnzbd: tuple[str, str]) -> None:
    connection = Connection("Ours", find_connector("sonarr"), sabnzbd[0], "0123456789")
    with pytest.raises(ServiceError) as refused:
        await ask("sonarr", sabnzbd[0], "0123456789")
    explained = await checks.explained(refused.value, connection)
    assert explained.message == "SABnzbd answers at the address of Ours, not Sonarr."


async def test_prometheus_tells_its_version_and_its_errors(prometheus: str) -> None:
    assert (await ask("prometheus", prometheus))[0] in "23"
    async with Client(Connection("Ours", find_connector("prometheus"), prometheus)).open() as client:
        with pytest.raises(Refused, match="parse error"):
            await client.get("/api/v1/query", query="up{")
        assert (await client.get("/api/v1/query", query="1 + 1"))["result"][1] == "2"


@contextmanager
def running(folder: Path, address: str, program: str, *options: str) -> Generator[str]:
    """The program, for as long as the block; its URL."""
    path = shutil.which(program)
    if path is None:
        reason = f"{program} is not installed, so its connector is tried with a likeness only."
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([path, *options], cwd=folder, stdout=log, stderr=log)
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(20)


def _wait_until_it_answers(url: str, folder: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            if httpx.get(url).is_success:
                return
        time.sleep(0.1)
    pytest.fail(f"It did not start:\n{(folder / 'log').read_text()}")


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
