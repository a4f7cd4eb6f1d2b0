"""A web page of another origin cannot use a server that asks for no credential, although its reader's browser could."""

import json
import os
import shutil
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import httpx
import pytest

from tests.support.platform import Platform, running_platform
from tests.support.waiting import TIMEOUT, eventually

pytestmark = [pytest.mark.platform, pytest.mark.deep]

ALLOWED = "https://chat.example"
EVIL = "https://evil.example"
PAGE = Path(__file__).parent / "attack.html"
HANDSHAKE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


@pytest.fixture(scope="module")
def server() -> Generator[Platform]:
    """A server that needs no credential, with one job that waits."""
    with running_platform({"mlflow.enabled": "false"}) as platform:
        platform.submit(run_after="2100-01-01T00:00:00Z")
        yield platform


@pytest.fixture(scope="module")
def guarded() -> Generator[Platform]:
    """A server that needs a credential, and lets the pages of one origin use it."""
    settings = {"mlflow.enabled": "false", "auth.required": "true", "serve.allowed_origins": f"['{ALLOWED}']"}
    with running_platform(settings, with_admin=True) as platform:
        yield platform


FOREIGN = {
    "a name of its own for this machine": {"Host": "evil.example"},
    "the same, with our port": {"Host": "evil.example:{port}"},
    "a name that begins like ours": {"Host": "127.0.0.1.evil.example:{port}"},
    "another origin": {"Origin": EVIL},
    "no origin": {"Origin": "null"},
    "another port of this machine": {"Origin": "http://127.0.0.1:1"},
    "another scheme": {"Origin": "https://127.0.0.1:{port}"},
    "another site": {"Sec-Fetch-Site": "cross-site"},
    "another origin of this site": {"Sec-Fetch-Site": "same-site"},
    "a proxy's word for it": {"Host": "evil.example", "X-Forwarded-Host": "127.0.0.1:{port}"},
}


@pytest.mark.parametrize("headers", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_page_is_refused_everywhere(server: Platform, headers: dict[str, str]) -> None:
    sent = with_port(server, headers)
    for method, path in (
        ("GET", "/api/v1/jobs"),
        ("POST", "/api/v1/jobs"),
        ("OPTIONS", "/api/v1/jobs"),
        ("GET", "/health"),
        ("GET", "/metrics"),
        ("GET", "/docs"),
        ("GET", "/api/v1/openapi.json"),
        ("GET", "/nowhere"),
    ):
        answer = server.http.request(method, path, headers=sent, json={"kind": "probe"} if method == "POST" else None)
        assert (answer.status_code, answer.json()["error_code"]) == (403, "CROSS_ORIGIN"), f"{method} {path}"
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    for path in ("/ws/page", "/ws/system", "/ws/logs"):
        assert shake_hands(server, path, sent) == 403
    assert everything(server)["total"] == 1


OWN = [
    {"Host": "localhost:{port}"},
    {"Host": "[::1]:{port}"},
    {"Origin": "http://127.0.0.1:{port}", "Sec-Fetch-Site": "same-origin"},
    {"Sec-Fetch-Site": "none"},
]


@pytest.mark.parametrize("headers", OWN)
def test_its_own_page_is_served(server: Platform, headers: dict[str, str]) -> None:
    sent = with_port(server, headers)
    assert server.http.get("/api/v1/jobs", headers=sent).status_code == 200
    assert shake_hands(server, "/ws/page", sent) == 101


def test_a_page_asks_before_it_sends_and_hears_no(server: Platform) -> None:
    asked = {"Origin": EVIL, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    answer = server.http.options("/api/v1/jobs", headers=asked)
    assert (answer.status_code, answer.headers.get("Access-Control-Allow-Origin")) == (403, None)


def test_pages_of_allowed_origins_may_use_a_guarded_server(guarded: Platform) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    allowed = guarded.http.options("/api/v1/jobs", headers={"Origin": ALLOWED, **asked})
    assert (allowed.status_code, allowed.headers["Access-Control-Allow-Origin"]) == (200, ALLOWED)
    assert "x-api-key" in allowed.headers["Access-Control-Allow-Headers"].lower()
    refused = guarded.http.options("/api/v1/jobs", headers={"Origin": EVIL, **asked})
    assert (refused.status_code, refused.headers.get("Access-Control-Allow-Origin")) == (400, None)
    # Errors too must be readable, or the page could not tell its reader that the key is wrong.
    for path, status in (("/health", 200), ("/api/v1/jobs", 401), ("/nowhere", 404)):
        for origin, told in ((ALLOWED, ALLOWED), (EVIL, None)):
            answer = guarded.http.get(path, headers={"Origin": origin})
            assert (answer.status_code, answer.headers.get("Access-Control-Allow-Origin")) == (status, told)
            assert "Access-Control-Allow-Credentials" not in answer.headers


def test_a_page_in_a_real_browser_gets_nothing_and_changes_nothing(server: Platform) -> None:
    before = everything(server)
    refusals = count_refusals(server)
    outcome = visit(server, before["items"][0]["id"])
    assert [name for name, result in outcome.items() if result.startswith("read")] == []
    assert everything(server) == before
    commands = eventually(lambda: commands_on_ray(server))
    assert [command for command in commands if command["type"] == "SUBMISSION"] == []
    # It was the server that refused, not only the browser that kept the answers to itself.
    assert count_refusals(server) - refusals >= 10


def with_port(platform: Platform, headers: dict[str, str]) -> dict[str, str]:
    return {name: value.format(port=platform.http.base_url.port) for name, value in headers.items()}


def shake_hands(platform: Platform, path: str, headers: dict[str, str]) -> int:
    """The status with which a WebSocket's handshake is answered."""
    with platform.http.stream("GET", path, headers={**HANDSHAKE, **headers}) as answer:
        return answer.status_code


def everything(platform: Platform) -> dict[str, Any]:
    answer = platform.http.get("/api/v1/jobs", params={"kind": "probe"})  # others come by the clock
    assert answer.status_code == 200
    return answer.json()


def commands_on_ray(platform: Platform) -> list[dict[str, Any]]:
    """What Ray's dashboard was told to run. It starts by itself, and may still be busy with that."""
    answer = httpx.get(f"{platform.dashboard_url}/api/jobs/")
    assert answer.status_code == 200, answer.text
    return answer.json()


def count_refusals(platform: Platform) -> float:
    lines = platform.http.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if "api_requests_total{" in line and 'status="403"' in line)


def visit(platform: Platform, job_id: str) -> dict[str, str]:
    """Open the page in Chromium, from another port of this machine, and wait for what it got."""
    page = PAGE.read_text()
    for word, value in (("TARGET", platform.url), ("DASHBOARD", platform.dashboard_url), ("JOB", job_id)):
        page = page.replace(word, value)
    outcome = Queue[dict[str, str]]()
    with (
        hosting(page, outcome) as url,
        TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        browsing(url, profile),
    ):
        return outcome.get(timeout=TIMEOUT)


@contextmanager
def hosting(page: str, outcome: "Queue[dict[str, str]]") -> Generator[str]:
    """The other origin: it serves the page, and takes what the page has to tell."""

    class Site(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(page)

        def do_POST(self) -> None:
            outcome.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._answer("")

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            return

        def _answer(self, text: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(text.encode())

    site = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    serving = Thread(target=site.serve_forever)
    serving.start()
    try:
        yield f"http://127.0.0.1:{site.server_port}"
    finally:
        site.shutdown()
        site.server_close()
        serving.join()


@contextmanager
def browsing(url: str, profile: str) -> Generator[None]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        reason = "Chromium is not installed, so no real browser tries to get past the checks."
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += [f"--user-data-dir={profile}", "--no-proxy-server", "--host-resolver-rules=MAP rebound.test 127.0.0.1"]
    browser = subprocess.Popen([program, *options, url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        browser.terminate()
        browser.wait(timeout=TIMEOUT)
