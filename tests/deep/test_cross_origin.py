"""A web page of another origin cannot use a server without credentials through the browser of its reader."""

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
    """A server without credentials, with one job that waits."""
    with running_platform({"mlflow.enabled": "false"}) as platform:
        platform.submit(run_after="2100-01-01T00:00:00Z")
        yield platform


@pytest.fixture(scope="module")
def guarded() -> Generator[Platform]:
    """A server with credentials that allows the pages of one origin."""
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
def test_requests_of_another_origin_are_refused_on_every_route(server: Platform, headers: dict[str, str]) -> None:
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
        response = server.http.request(method, path, headers=sent, json={"kind": "probe"} if method == "POST" else None)
        assert (response.status_code, response.json()["error_code"]) == (403, "CROSS_ORIGIN"), f"{method} {path}"
        assert not [name for name in response.headers if name.startswith("access-control-")]
    for path in ("/ws/page", "/ws/system", "/ws/logs"):
        assert handshake_status(server, path, sent) == 403
    assert probe_jobs(server)["total"] == 1


OWN = [
    {"Host": "localhost:{port}"},
    {"Host": "[::1]:{port}"},
    {"Origin": "http://127.0.0.1:{port}", "Sec-Fetch-Site": "same-origin"},
    {"Sec-Fetch-Site": "none"},
]


@pytest.mark.parametrize("headers", OWN)
def test_requests_of_the_same_origin_are_accepted(server: Platform, headers: dict[str, str]) -> None:
    sent = with_port(server, headers)
    assert server.http.get("/api/v1/jobs", headers=sent).status_code == 200
    assert handshake_status(server, "/ws/page", sent) == 101


def test_a_preflight_of_another_origin_is_refused(server: Platform) -> None:
    headers = {"Origin": EVIL, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    response = server.http.options("/api/v1/jobs", headers=headers)
    assert (response.status_code, response.headers.get("Access-Control-Allow-Origin")) == (403, None)


def test_pages_of_allowed_origins_may_use_a_guarded_server(guarded: Platform) -> None:
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    allowed = guarded.http.options("/api/v1/jobs", headers={"Origin": ALLOWED, **preflight})
    assert (allowed.status_code, allowed.headers["Access-Control-Allow-Origin"]) == (200, ALLOWED)
    assert "x-api-key" in allowed.headers["Access-Control-Allow-Headers"].lower()
    refused = guarded.http.options("/api/v1/jobs", headers={"Origin": EVIL, **preflight})
    assert (refused.status_code, refused.headers.get("Access-Control-Allow-Origin")) == (400, None)
    # Errors must be readable too, or the page could not show that the key is wrong.
    for path, status in (("/health", 200), ("/api/v1/jobs", 401), ("/nowhere", 404)):
        for origin, expected in ((ALLOWED, ALLOWED), (EVIL, None)):
            response = guarded.http.get(path, headers={"Origin": origin})
            assert (response.status_code, response.headers.get("Access-Control-Allow-Origin")) == (status, expected)
            assert "Access-Control-Allow-Credentials" not in response.headers


def test_a_page_in_a_real_browser_reads_and_changes_nothing(server: Platform) -> None:
    before = probe_jobs(server)
    refusals = count_refusals(server)
    outcome = visit(server, before["items"][0]["id"])
    assert [name for name, result in outcome.items() if result.startswith("read")] == []
    assert probe_jobs(server) == before
    submissions = eventually(lambda: ray_jobs(server))
    assert [submission for submission in submissions if submission["type"] == "SUBMISSION"] == []
    # The server refused the requests; the browser did not just hide the responses.
    assert count_refusals(server) - refusals >= 10


def with_port(platform: Platform, headers: dict[str, str]) -> dict[str, str]:
    return {name: value.format(port=platform.http.base_url.port) for name, value in headers.items()}


def handshake_status(platform: Platform, path: str, headers: dict[str, str]) -> int:
    """Return the status code of a WebSocket's handshake."""
    with platform.http.stream("GET", path, headers={**HANDSHAKE, **headers}) as response:
        return response.status_code


def probe_jobs(platform: Platform) -> dict[str, Any]:
    response = platform.http.get("/api/v1/jobs", params={"kind": "probe"})  # schedules start jobs of other kinds
    assert response.status_code == 200
    return response.json()


def ray_jobs(platform: Platform) -> list[dict[str, Any]]:
    """List the jobs that were submitted to Ray's dashboard, which may still be starting."""
    token = (platform.home / "keys" / "ray").read_text()
    response = httpx.get(f"{platform.dashboard_url}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    assert response.status_code == 200, response.text
    return response.json()


def count_refusals(platform: Platform) -> float:
    lines = platform.http.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if "api_requests_total{" in line and 'status="403"' in line)


def visit(platform: Platform, job_id: str) -> dict[str, str]:
    """Open the page in Chromium, from another port of this machine, and return the results that it reports."""
    page = PAGE.read_text()
    for placeholder, value in (("TARGET", platform.url), ("DASHBOARD", platform.dashboard_url), ("JOB", job_id)):
        page = page.replace(placeholder, value)
    outcome = Queue[dict[str, str]]()
    with (
        serve_page(page, outcome) as url,
        TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        open_browser(url, profile),
    ):
        return outcome.get(timeout=TIMEOUT)


@contextmanager
def serve_page(page: str, outcome: "Queue[dict[str, str]]") -> Generator[str]:
    """Run the other origin, which serves the page and receives its results."""

    class Site(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._respond(page)

        def do_POST(self) -> None:
            outcome.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._respond("")

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            return

        def _respond(self, text: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(text.encode())

    site = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = Thread(target=site.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{site.server_port}"
    finally:
        site.shutdown()
        site.server_close()
        thread.join()


@contextmanager
def open_browser(url: str, profile: str) -> Generator[None]:
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
