"""A fake of each service: it responds to a health check, checks the key, and shows its page to a browser."""

from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import parse_qs

from tests.support.services.stub_server import (
    Handler,
    StubRequest,
    StubResponse,
    html_page,
    json_response,
    text_response,
)

KEY = "0123456789abcdef0123456789abcdef"
LOGIN = "ada:correct horse"

ARR_STATUS = {
    "instanceName": "ours",
    "buildTime": "2026-01-01T00:00:00Z",
    "isDebug": False,
    "isProduction": True,
    "isAdmin": False,
    "isUserInteractive": False,
    "startupPath": "/app/bin",
    "appData": "/config",
    "osName": "debian",
    "osVersion": "12",
    "isNetCore": True,
    "isLinux": True,
    "isOsx": False,
    "isWindows": False,
    "isDocker": True,
    "mode": "console",
    "branch": "main",
    "authentication": "forms",
    "databaseType": "sqLite",
    "databaseVersion": "3.45.0",
    "migrationVersion": 217,
    "urlBase": "",
    "runtimeVersion": "8.0.12",
    "runtimeName": ".NET",
    "startTime": "2026-01-01T00:00:00Z",
    "packageUpdateMechanism": "docker",
}


@dataclass(frozen=True)
class FakeService:
    title: str
    version: str
    answer: Handler
    has_key: Callable[[StubRequest], bool]
    unauthorized: StubResponse  # the response to a wrong key
    requires_key: bool = True
    key: str = KEY

    def __call__(self, request: StubRequest) -> StubResponse:
        is_authorized = not self.requires_key or self.has_key(request)
        reply = self.answer(request) if is_authorized else self.unauthorized
        if request.path == "/" and request.headers["accept"] == "text/html" and self.title:
            return html_page(self.title)
        return reply


def has_header(name: str, value: str) -> Callable[[StubRequest], bool]:
    return lambda request: request.headers.get(name) == value


def has_parameter(name: str) -> Callable[[StubRequest], bool]:
    return lambda request: request.query.get(name) == KEY


def json_at(path: str, content: object) -> Handler:
    return routes({path: json_response(content)})


def routes(replies: dict[str, StubResponse]) -> Handler:
    return lambda request: replies.get(request.path, StubResponse(b"", 404, "text/plain"))


def sabnzbd(request: StubRequest) -> StubResponse:
    if request.path != "/api":
        return html_page("Not found", 404)
    if request.query.get("mode") == "version":
        return json_response({"version": "3.7.1"})
    return json_response({"queue": {"version": "3.7.1", "paused": False, "slots": []}})


def tautulli(request: StubRequest) -> StubResponse:
    if request.path != "/api/v2":
        return html_page("Not found", 404)
    data = {"tautulli_version": "v2.14.6", "tautulli_install_type": "docker"}
    return json_response({"response": {"result": "success", "message": None, "data": data}})


def qbittorrent(request: StubRequest) -> StubResponse:
    match request.path:
        case "/api/v2/app/buildInfo":
            return json_response(
                {"qt": "6.7.3", "libtorrent": "2.0.11.0", "boost": "1.87", "openssl": "3.4", "bitness": 64}
            )
        case "/api/v2/app/version":
            return text_response("v5.0.4")
        case "/api/v2/auth/logout":
            return text_response("")
        case _:
            return text_response("Not Found", 404)


class QBittorrent(FakeService):
    """A login returns the session as a cookie."""

    def __call__(self, request: StubRequest) -> StubResponse:
        if request.path != "/api/v2/auth/login":
            return super().__call__(request)
        form = {name: values[0] for name, values in parse_qs(request.body.decode()).items()}
        if (form.get("username"), form.get("password")) != ("ada", "correct horse"):
            return text_response("Fails.")
        return StubResponse(b"Ok.", 200, "text/plain", {"Set-Cookie": "SID=session; HttpOnly; path=/"})


def arr(title: str, api: str, version: str) -> FakeService:
    status = {"appName": title, "version": version, **ARR_STATUS}
    return FakeService(
        title,
        version,
        json_at(f"{api}/system/status", status),
        has_header("x-api-key", KEY),
        json_response({"error": "Unauthorized"}, 401),
    )


NEVER_UNAUTHORIZED = StubResponse(b"", 500)
FAKE_SERVICES = {
    "sonarr": arr("Sonarr", "/api/v3", "4.0.14.2939"),
    "radarr": arr("Radarr", "/api/v3", "5.22.4.9896"),
    "prowlarr": arr("Prowlarr", "/api/v1", "1.34.1.5021"),
    "sabnzbd": FakeService(
        "SABnzbd", "3.7.1", sabnzbd, has_parameter("apikey"), text_response("API Key Incorrect", 403)
    ),
    "plex": FakeService(
        "Plex",
        "1.41.6.9685",
        json_at("/", {"MediaContainer": {"size": 25, "machineIdentifier": "abc", "version": "1.41.6.9685"}}),
        has_header("x-plex-token", KEY),
        html_page("Unauthorized", 401),
    ),
    "overseerr": FakeService(
        "Overseerr",
        "1.34.0",
        json_at("/api/v1/settings/about", {"version": "1.34.0", "totalRequests": 3, "totalMediaItems": 9}),
        has_header("x-api-key", KEY),
        json_response({"status": 403, "error": "You do not have permission to access this endpoint"}, 403),
    ),
    "jellyfin": FakeService(
        "Jellyfin",
        "10.10.7",
        json_at("/System/Info", {"ProductName": "Jellyfin Server", "Version": "10.10.7", "Id": "abc"}),
        has_header("authorization", f'MediaBrowser Token="{KEY}"'),
        StubResponse(b"", 401, ""),
    ),
    "tautulli": FakeService(
        "Tautulli",
        "2.14.6",
        tautulli,
        has_parameter("apikey"),
        json_response({"response": {"result": "error", "message": "Invalid apikey", "data": {}}}),
    ),
    "bazarr": FakeService(
        "Bazarr",
        "1.5.2",
        json_at("/api/system/status", {"data": {"bazarr_version": "1.5.2", "sonarr_version": "4.0.14"}}),
        has_header("x-api-key", KEY),
        json_response("Unauthorized", 401),
    ),
    "qbittorrent": QBittorrent(
        "qBittorrent WebUI",
        "5.0.4",
        qbittorrent,
        has_header("cookie", "SID=session"),
        text_response("Forbidden", 403),
        key=LOGIN,
    ),
    "ollama": FakeService(
        "",
        "0.12.3",
        routes({"/api/version": json_response({"version": "0.12.3"}), "/api/tags": json_response({"models": []})}),
        lambda request: True,
        NEVER_UNAUTHORIZED,
        requires_key=False,
    ),
    "searxng": FakeService(
        "SearXNG",
        "2026.1.1",
        json_at("/config", {"version": "2026.1.1", "engines": [], "categories": ["general"]}),
        lambda request: True,
        NEVER_UNAUTHORIZED,
        requires_key=False,
    ),
    "proxmox": FakeService(
        "pve - Proxmox Virtual Environment",
        "8.4.1",
        json_at("/api2/json/version", {"data": {"version": "8.4.1", "release": "8.4", "repoid": "2a5fa54a8503f96d"}}),
        has_header("authorization", f"PVEAPIToken={KEY}"),
        json_response({"data": None}, 401),
    ),
    "qdrant": FakeService(
        "",
        "1.15.4",
        routes(
            {
                "/": json_response({"title": "qdrant - vector search engine", "version": "1.15.4"}),
                "/collections": json_response({"result": {"collections": []}, "status": "ok", "time": 0.001}),
            }
        ),
        has_header("api-key", KEY),
        text_response("Must provide an API key or an Authorization bearer token", 401),
    ),
    "prometheus": FakeService(
        "Prometheus Time Series Collection and Processing Server",
        "2.53.0",
        json_at(
            "/api/v1/status/buildinfo", {"status": "success", "data": {"version": "2.53.0", "goVersion": "go1.22"}}
        ),
        lambda request: True,
        NEVER_UNAUTHORIZED,
        requires_key=False,
    ),
}
