"""How each service answers a health check, its key, and a person's browser: as far as a connector can tell."""

from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import parse_qs

from tests.support.services.stub_server import Asked, Handler, Reply, page, telling, text

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
class Likeness:
    title: str
    version: str
    answer: Handler  # what it says to those whose key is right
    has_key: Callable[[Asked], bool]
    refusal: Reply  # what it says to those whose key is not
    guards: bool = True
    key: str = KEY

    def __call__(self, asked: Asked) -> Reply:
        knows = not self.guards or self.has_key(asked)
        reply = self.answer(asked) if knows else self.refusal
        if asked.path == "/" and asked.headers["accept"] == "text/html" and self.title:
            return page(self.title)
        return reply


def header(name: str, value: str) -> Callable[[Asked], bool]:
    return lambda asked: asked.headers.get(name) == value


def parameter(name: str) -> Callable[[Asked], bool]:
    return lambda asked: asked.query.get(name) == KEY


def at(path: str, content: object) -> Handler:
    return routes({path: telling(content)})


def routes(replies: dict[str, Reply]) -> Handler:
    return lambda asked: replies.get(asked.path, Reply(b"", 404, "text/plain"))


def sabnzbd(asked: Asked) -> Reply:
    if asked.path != "/api":
        return page("Not found", 404)
    if asked.query.get("mode") == "version":
        return telling({"version": "3.7.1"})
    return telling({"queue": {"version": "3.7.1", "paused": False, "slots": []}})


def tautulli(asked: Asked) -> Reply:
    if asked.path != "/api/v2":
        return page("Not found", 404)
    data = {"tautulli_version": "v2.14.6", "tautulli_install_type": "docker"}
    return telling({"response": {"result": "success", "message": None, "data": data}})


def qbittorrent(asked: Asked) -> Reply:
    match asked.path:
        case "/api/v2/app/buildInfo":
            return telling({"qt": "6.7.3", "libtorrent": "2.0.11.0", "boost": "1.87", "openssl": "3.4", "bitness": 64})
        case "/api/v2/app/version":
            return text("v5.0.4")
        case "/api/v2/auth/logout":
            return text("")
        case _:
            return text("Not Found", 404)


class QBittorrent(Likeness):
    """Its session is a cookie, which a login gives."""

    def __call__(self, asked: Asked) -> Reply:
        if asked.path != "/api/v2/auth/login":
            return super().__call__(asked)
        said = {name: values[0] for name, values in parse_qs(asked.body.decode()).items()}
        if (said.get("username"), said.get("password")) != ("ada", "correct horse"):
            return text("Fails.")
        return Reply(b"Ok.", 200, "text/plain", {"Set-Cookie": "SID=session; HttpOnly; path=/"})


def arr(title: str, api: str, version: str) -> Likeness:
    status = {"appName": title, "version": version, **ARR_STATUS}
    return Likeness(
        title,
        version,
        at(f"{api}/system/status", status),
        header("x-api-key", KEY),
        telling({"error": "Unauthorized"}, 401),
    )


NOBODY = Reply(b"", 500)
LIKENESSES = {
    "sonarr": arr("Sonarr", "/api/v3", "4.0.14.2939"),
    "radarr": arr("Radarr", "/api/v3", "5.22.4.9896"),
    "prowlarr": arr("Prowlarr", "/api/v1", "1.34.1.5021"),
    "sabnzbd": Likeness("SABnzbd", "3.7.1", sabnzbd, parameter("apikey"), text("API Key Incorrect", 403)),
    "plex": Likeness(
        "Plex",
        "1.41.6.9685",
        at("/", {"MediaContainer": {"size": 25, "machineIdentifier": "abc", "version": "1.41.6.9685"}}),
        header("x-plex-token", KEY),
        page("Unauthorized", 401),
    ),
    "overseerr": Likeness(
        "Overseerr",
        "1.34.0",
        at("/api/v1/settings/about", {"version": "1.34.0", "totalRequests": 3, "totalMediaItems": 9}),
        header("x-api-key", KEY),
        telling({"status": 403, "error": "You do not have permission to access this endpoint"}, 403),
    ),
    "jellyfin": Likeness(
        "Jellyfin",
        "10.10.7",
        at("/System/Info", {"ProductName": "Jellyfin Server", "Version": "10.10.7", "Id": "abc"}),
        header("authorization", f'MediaBrowser Token="{KEY}"'),
        Reply(b"", 401, ""),
    ),
    "tautulli": Likeness(
        "Tautulli",
        "2.14.6",
        tautulli,
        parameter("apikey"),
        telling({"response": {"result": "error", "message": "Invalid apikey", "data": {}}}),
    ),
    "bazarr": Likeness(
        "Bazarr",
        "1.5.2",
        at("/api/system/status", {"data": {"bazarr_version": "1.5.2", "sonarr_version": "4.0.14"}}),
        header("x-api-key", KEY),
        telling("Unauthorized", 401),
    ),
    "qbittorrent": QBittorrent(
        "qBittorrent WebUI", "5.0.4", qbittorrent, header("cookie", "SID=session"), text("Forbidden", 403), key=LOGIN
    ),
    "ollama": Likeness(
        "",
        "0.12.3",
        routes({"/api/version": telling({"version": "0.12.3"}), "/api/tags": telling({"models": []})}),
        lambda asked: True,
        NOBODY,
        guards=False,
    ),
    "searxng": Likeness(
        "SearXNG",
        "2026.1.1",
        at("/config", {"version": "2026.1.1", "engines": [], "categories": ["general"]}),
        lambda asked: True,
        NOBODY,
        guards=False,
    ),
    "proxmox": Likeness(
        "pve - Proxmox Virtual Environment",
        "8.4.1",
        at("/api2/json/version", {"data": {"version": "8.4.1", "release": "8.4", "repoid": "2a5fa54a8503f96d"}}),
        header("authorization", f"PVEAPIToken={KEY}"),
        telling({"data": None}, 401),
    ),
    "qdrant": Likeness(
        "",
        "1.15.4",
        routes(
            {
                "/": telling({"title": "qdrant - vector search engine", "version": "1.15.4"}),
                "/collections": telling({"result": {"collections": []}, "status": "ok", "time": 0.001}),
            }
        ),
        header("api-key", KEY),
        text("Must provide an API key or an Authorization bearer token", 401),
    ),
    "prometheus": Likeness(
        "Prometheus Time Series Collection and Processing Server",
        "2.53.0",
        at("/api/v1/status/buildinfo", {"status": "success", "data": {"version": "2.53.0", "goVersion": "go1.22"}}),
        lambda asked: True,
        NOBODY,
        guards=False,
    ),
}
