"""Real services on loopback: Debian's SABnzbd, Prometheus and searx, and Prism, each with its own folder.

The first in PATH is used, so that the tests can run with another release. A module starts a service once:
`with real_services.sabnzbd(tmp_path_factory.mktemp("sabnzbd")) as server`.
"""

import configparser
import json
import os
import shutil
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import yaml

from tests.support.platform import unused_ports
from tests.support.services.openapi_documents import corrected
from tests.support.waiting import TIMEOUT, eventually

PRISM = Path(__file__).parents[3] / ".state" / "prism" / "node_modules" / ".bin" / "prism"
""".ci/run installs it here, from npm."""


@dataclass(frozen=True)
class RunningService:
    url: str
    folder: Path
    key: str = field(default="", repr=False)


@contextmanager
def sabnzbd(folder: Path) -> Generator[RunningService]:
    """SABnzbd, whose downloads go to `complete` in the folder."""
    ini, address = folder / "sabnzbd.ini", _free_address()
    # By default its folders are in the home of its user, and it waits five seconds before it calls a news server again
    # from which it has disconnected.
    folders = f"download_dir = {folder / 'incomplete'}\ncomplete_dir = {folder / 'complete'}\n"
    ini.write_text(f"[misc]\n{folders}auto_disconnect = 0\nurl_base = /sabnzbd\n")
    with _running(
        folder, address, "/api?mode=version&output=json", "sabnzbdplus", "-f", str(ini), "-s", address, "-b", "0"
    ) as url:
        # The lines before the first section are no valid INI.
        settings = configparser.RawConfigParser(strict=False, interpolation=None)
        settings.read_string("[top]\n" + ini.read_text())
        yield RunningService(url, folder, settings["misc"]["api_key"])


@contextmanager
def node_exporter(folder: Path) -> Generator[RunningService]:
    """The exporter of this machine's metrics."""
    address = _free_address()
    with _running(folder, address, "/metrics", "prometheus-node-exporter", f"--web.listen-address={address}") as url:
        yield RunningService(url, folder)


@contextmanager
def prometheus(folder: Path, *scraped: RunningService) -> Generator[RunningService]:
    """Prometheus, which scrapes these every second, and has done so once."""
    targets = [running.url.removeprefix("http://") for running in scraped]
    jobs = [{"job_name": "scraped", "static_configs": [{"targets": targets}]}] if targets else []
    config = {"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = _free_address()
    options = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with _running(folder, address, "/-/ready", "prometheus", *options, f"--web.listen-address={address}") as url:
        eventually(lambda: _scraped(url) >= len(scraped))
        yield RunningService(url, folder)


@contextmanager
def prism(folder: Path, document: str) -> Generator[RunningService]:
    """Prism, which responds as the official document of a service declares, and refuses invalid requests."""
    (folder / "document.json").write_text(json.dumps(corrected(document)))
    address = _free_address()
    host, port = address.split(":")
    program = str(PRISM) if PRISM.exists() else "prism"
    with _running(
        folder, address, "/api/v3/system/status", program, "mock", str(folder / "document.json"), "-h", host, "-p", port
    ) as url:
        yield RunningService(url, folder)


@contextmanager
def searx(folder: Path, results_url: str) -> Generator[RunningService]:
    """searx, whose only engine gets {"results": [{"url", "title"}]} from the URL `finds`."""
    example = Path("/usr/share/doc/searx/examples/settings.yml")
    settings = yaml.safe_load(example.read_text()) if example.exists() else {}
    address = _free_address()
    engine = {
        "name": "ours",
        "engine": "json_engine",
        "shortcut": "o",
        "categories": "general",
        "enable_http": True,
        "timeout": TIMEOUT,
    }
    fields = {"results_query": "results", "url_query": "url", "title_query": "title", "content_query": "title"}
    settings["engines"] = [{**engine, **fields, "search_url": f"{results_url}/?q={{query}}"}]
    settings["search"] = {**settings.get("search", {}), "formats": ["html", "json"]}
    server = {"bind_address": "127.0.0.1", "port": int(address.rpartition(":")[2]), "secret_key": "of a test"}
    settings["server"] = {**settings.get("server", {}), **server}
    (folder / "settings.yml").write_text(yaml.safe_dump(settings))
    # It is installed for the system's Python, without a program of its own.
    options = [f"SEARX_SETTINGS_PATH={folder / 'settings.yml'}", "/usr/bin/python3", "-m", "searx.webapp"]
    with _running(folder, address, "/config", "env" if example.exists() else "searx", *options) as url:
        yield RunningService(url, folder)


@contextmanager
def _running(folder: Path, address: str, health: str, program: str, *options: str) -> Generator[str]:
    """Run a program during the block; yields its URL once the path `health` responds."""
    path = shutil.which(program)
    if path is None:
        reason = f"{program} is not installed, so its tests run with fakes only."
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([path, *options], cwd=folder, stdout=log, stderr=log)

    def responds() -> bool:
        if process.poll() is not None:
            pytest.fail(f"{program} did not start:\n{(folder / 'log').read_text()}")
        headers = {"X-Api-Key": "any", "Accept": "application/json"}
        return httpx.get(f"http://{address}{health}", headers=headers).is_success

    try:
        eventually(responds)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(TIMEOUT)


def _scraped(prometheus: str) -> int:
    """How many targets Prometheus has scraped."""
    body = httpx.get(f"{prometheus}/api/v1/query", params={"query": "count(up == 1)"}).json()
    return sum(int(sample["value"][1]) for sample in body["data"]["result"])


def _free_address() -> str:
    return f"127.0.0.1:{unused_ports(1)[0]}"
