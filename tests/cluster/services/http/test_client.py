"""The errors of the HTTP client for invalid responses and network failures, none of which contains the key."""

import asyncio
import gzip
import json
import socket
import ssl
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.services.catalog import find_connector
from cluster.services.errors import BadResponse, NotFoundInService, Refused, ServiceError, Unauthorized, Unreachable
from cluster.services.http import client as clients
from cluster.services.http.client import Client
from cluster.services.http.connection import Connection
from cluster.services.http.urls import InvalidServiceUrl, validate_url
from cluster.settings import get_settings
from tests.support.services.fake_services import KEY
from tests.support.services.stub_server import (
    Handler,
    StubRequest,
    StubResponse,
    html_page,
    json_response,
    stub_server,
    text_response,
)
from tests.support.waiting import TIMEOUT

LONG = 50 * 1024 * 1024


@pytest.fixture(autouse=True)
def settings(home: Path) -> None:
    """A client needs the setting of its timeout."""


def client(url: str, name: str = "sonarr", **options: Any) -> Client:
    return Client(Connection("Ours", find_connector(name), url, KEY, **options))


async def get(response: Handler | StubResponse, name: str = "sonarr") -> Any:
    async with stub_server(_handler(response)) as server, client(server.url, name).open() as opened:
        return await opened.get("/api/v3/thing", page=1)


INVALID_RESPONSES: dict[str, tuple[Handler | StubResponse, type[ServiceError], str]] = {
    "a page": (html_page("Sign in"), BadResponse, "a web page titled 'Sign in'"),
    "words": (text_response("all is well"), BadResponse, "not JSON"),
    "nothing": (StubResponse(b""), BadResponse, "not JSON"),
    "half of it": (StubResponse(b'{"records": [{"id": 1}, {"i'), BadResponse, "only a part"),
    "no such text": (StubResponse(b'"\xff\xfe"'), BadResponse, "not JSON"),
    "less than announced": (StubResponse(b'{"records": [', length=900), Unreachable, "cannot be reached"),
    "packed wrongly": (StubResponse(b"no gzip", headers={"Content-Encoding": "gzip"}), BadResponse, "decompressed"),
    "no HTTP": (StubResponse(b"", 200, "x\r\nno header at all"), Unreachable, "cannot be reached"),
    "no key": (json_response({"error": "Unauthorized"}, 401), Unauthorized, "with this API key: Unauthorized"),
    "forbidden": (
        text_response("Access denied - Hostname verification failed", 403),
        Unauthorized,
        "Hostname verification",
    ),
    "not there": (
        json_response({"message": "NotFound"}, 404),
        NotFoundInService,
        "has nothing at /api/v3/thing: NotFound",
    ),
    "refused": (
        json_response([{"propertyName": "Path", "errorMessage": "Path is not valid"}], 400),
        Refused,
        "Path is not valid",
    ),
    "busy": (text_response("slow down", 429), Unreachable, "status 429"),
    "a proxy's": (html_page("502 Bad Gateway", 502), Unreachable, "502 Bad Gateway"),
    "broken": (json_response({"message": "database is locked"}, 500), BadResponse, "database is locked"),
    "in circles": (
        lambda request: StubResponse(b"", 302, headers={"Location": request.path}),
        BadResponse,
        "redirects more than",
    ),
    "away": (
        StubResponse(b"", 302, headers={"Location": "http://elsewhere.example/api?x=1"}),
        BadResponse,
        "redirects to http://elsewhere.example; if that is correct, set it as the url",
    ),
    "to another scheme": (
        StubResponse(b"", 301, headers={"Location": "https://127.0.0.1/"}),
        BadResponse,
        "set it as the url",
    ),
    "to nowhere": (StubResponse(b"", 302, headers={"Location": "http://[::"}), Unreachable, "Invalid URL"),
}


@pytest.mark.parametrize("name", INVALID_RESPONSES)
async def test_each_invalid_response_has_its_error(name: str) -> None:
    response, error, message = INVALID_RESPONSES[name]
    with pytest.raises(error) as refused:
        await get(response)
    assert type(refused.value) is error
    assert message in refused.value.message
    assert "Ours" in refused.value.message
    assert refused.value.status in {400, 404, 503}


@pytest.mark.parametrize("status", [200, 400, 500])
async def test_a_key_in_a_response_is_masked(status: int) -> None:
    def handle(request: StubRequest) -> StubResponse:
        return json_response({"status": False, "error": f"nothing for {request.query['apikey']}"}, status)

    with pytest.raises(ServiceError, match=r"nothing for \*{8}") as refused:
        await get(handle, "sabnzbd")
    assert KEY not in "".join(traceback.format_exception(refused.value))


async def test_an_ipv6_address_is_accepted() -> None:
    async with (
        await asyncio.start_server(_respond_with_empty_object, "::1", 0) as server,
        client(f"http://[::1]:{server.sockets[0].getsockname()[1]}").open() as opened,
    ):
        assert await opened.get("/") == {}


async def test_an_error_with_status_200_is_an_error() -> None:
    with pytest.raises(Refused, match="item does not exist"):
        await get(json_response({"status": False, "error": "item does not exist"}), "sabnzbd")
    with pytest.raises(Unauthorized, match="API Key Incorrect"):
        await get(json_response({"status": False, "error": "API Key Incorrect"}), "sabnzbd")
    with pytest.raises(Refused, match="bad_data"):
        await get(json_response({"status": "error", "errorType": "bad_data", "error": "bad_data: parse"}), "prometheus")


async def test_a_refused_connection_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # without listening
        async with client(f"http://127.0.0.1:{taken.getsockname()[1]}").open() as opened:
            with pytest.raises(Unreachable, match="Ours cannot be reached"):
                await opened.get("/")


async def test_a_host_name_that_cannot_be_resolved_is_an_error() -> None:
    async with client("http://no-such-machine.invalid").open() as opened:
        with pytest.raises(Unreachable, match="cannot be resolved"):
            await opened.get("/")


async def test_a_missing_response_ends_at_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_SERVICES__TIMEOUT_SECONDS", "0.2")
    get_settings.cache_clear()
    with pytest.raises(Unreachable, match=r"within 0\.2 seconds"):
        await get(StubResponse(hangs=True))


async def test_a_slow_response_ends_at_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, but the response never ends."""
    monkeypatch.setenv("FORGEARR_SERVICES__TIMEOUT_SECONDS", "2")
    get_settings.cache_clear()
    disconnected = asyncio.Event()

    async def send_slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            while not writer.is_closing() and not reader.at_eof():
                writer.write(b" ")
                await asyncio.wait([asyncio.ensure_future(reader.read(1))], timeout=0.02)
        finally:
            writer.close()
            disconnected.set()

    async with await asyncio.start_server(send_slowly, "127.0.0.1", 0) as server:
        async with client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}").open() as opened:
            with pytest.raises(Unreachable, match="within"):
                await opened.get("/")
        async with asyncio.timeout(TIMEOUT):
            await disconnected.wait()


async def test_the_size_of_a_response_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len((await get(StubResponse(b'{"a": "' + b"x" * LONG + b'"}')))["a"]) == LONG
    monkeypatch.setattr(clients, "MAX_BYTES", 1024 * 1024)
    with pytest.raises(BadResponse, match="more than 1 MiB"):
        await get(StubResponse(b'{"a": "' + b"x" * LONG + b'"}'))
    compressed = gzip.compress(b'{"a": "' + b"x" * LONG + b'"}')
    assert len(compressed) < 1024 * 1024
    with pytest.raises(BadResponse, match="more than 1 MiB"):
        await get(StubResponse(compressed, headers={"Content-Encoding": "gzip"}))


async def test_a_redirect_on_the_same_server_is_followed_with_the_key() -> None:
    def handle(request: StubRequest) -> StubResponse:
        if request.path == "/sonarr/there":
            return json_response({"key": request.headers["x-api-key"]})
        return StubResponse(b"", 301, headers={"Location": "/sonarr/there"})

    assert await get(handle) == {"key": KEY}


async def test_a_redirect_of_a_post_is_not_followed() -> None:
    async with (
        stub_server(lambda request: StubResponse(b"", 302, headers={"Location": "/there"})) as server,
        client(server.url).open() as opened,
    ):
        with pytest.raises(BadResponse, match="set it as the url"):
            await opened.post("/here", {"a": 1})
    assert [request.path for request in server.requests] == ["/here"]


@pytest.mark.parametrize(("method", "times"), [("get", 2), ("get_once", 1), ("post", 1), ("put", 1), ("delete", 1)])
async def test_only_repeatable_requests_are_sent_again(method: str, times: int) -> None:
    """The first response is incomplete, because the connection breaks."""
    responses = iter([StubResponse(b"{", length=100), json_response({"fine": True})])
    async with stub_server(lambda request: next(responses)) as server, client(server.url).open() as opened:
        call: Callable[[str], Any] = getattr(opened, method)
        if times == 2:
            assert await call("/thing") == {"fine": True}
        else:
            with pytest.raises(Unreachable):
                await call("/thing")
    assert len(server.requests) == times


async def test_a_body_is_sent_and_an_empty_response_is_none() -> None:
    name = 'Größe "x" 🎬'
    async with stub_server(lambda request: StubResponse(b"", 204)) as server, client(server.url).open() as opened:
        assert await opened.put("/api/v3/movie", {"title": name}, moveFiles=True) is None
    (request,) = server.requests
    assert (json.loads(request.body), request.query) == ({"title": name}, {"moveFiles": "true"})


async def test_the_message_of_an_error_is_one_short_line() -> None:
    with pytest.raises(Refused) as refused:
        await get(text_response("no\n" * 5000, 400))
    assert len(refused.value.message) < 400
    assert "\n" not in refused.value.message


@pytest.mark.parametrize("verify", [True, False])
async def test_a_self_signed_certificate_is_accepted_only_by_setting(tmp_path: Path, verify: bool) -> None:
    async with await asyncio.start_server(
        _respond_with_empty_object, "127.0.0.1", 0, ssl=_self_signed(tmp_path)
    ) as server:
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with client(url, verify_tls=verify).open() as opened:
            if verify:
                with pytest.raises(Unreachable, match="set verify_tls to false"):
                    await opened.get("/")
            else:
                assert await opened.get("/") == {}


# Addresses


@pytest.mark.parametrize(
    "url",
    [
        "http://192.168.1.100:8989",
        "https://sonarr.example/base",
        "http://localhost:8989",
        "http://127.0.0.1",
        "http://[fd12:3456::1]:8989",
        "http://sonarr:8989",
    ],
)
def test_addresses_of_home_networks_are_valid(url: str) -> None:
    assert validate_url(f"{url}/") == url


@pytest.mark.parametrize(
    "url",
    [
        "ftp://sonarr",
        "file:///etc/passwd",
        "sonarr:8989",
        "http://",
        "http://user:pw@sonarr",
        "http://token@sonarr",
        "http://sonarr?apikey=1",
        "http://sonarr#x",
        "http://sonarr:0",
        "http://sonarr:99999",
        "http://son arr",
        "http://sonarr\r\nX: y",
        "http://169.254.169.254",
        "http://[fe80::1]",
        "http://[fd00:ec2::254]",
        "http://[::ffff:169.254.169.254]",
        "http://100.100.100.200",
        "http://2852039166",
        "http://0xa9fea9fe",
        "http://0.0.0.0",
        "http://[::]",
        "http://224.0.0.1",
    ],
)
def test_metadata_services_and_malformed_urls_are_refused(url: str) -> None:
    with pytest.raises(InvalidServiceUrl):
        validate_url(url)


async def test_a_name_that_resolves_to_a_metadata_service_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused even if it also has a valid address."""
    async with stub_server(lambda request: json_response({})) as server:
        port = int(server.url.rpartition(":")[2])
        addresses = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in ("127.0.0.1", "169.254.169.254")]

        async def resolve(*_: object, **__: object) -> Any:
            return addresses

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
        async with client(f"http://rebound.example:{port}").open() as opened:
            with pytest.raises(Unreachable, match="no service may have"):
                await opened.get("/")
            assert server.requests == []
            addresses.pop()
            assert await opened.get("/") == {}
        assert server.requests[0].headers["host"] == f"rebound.example:{port}"


async def test_the_address_that_listens_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with stub_server(lambda request: json_response({})) as server:
        port = int(server.url.rpartition(":")[2])

        async def resolve(*_: object, **__: object) -> Any:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in ("127.0.0.2", "127.0.0.1")]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
        async with client(f"http://sonarr.example:{port}").open() as opened:
            assert await opened.get("/") == {}


async def test_an_address_that_never_accepts_does_not_block_others(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("FORGEARR_SERVICES__TIMEOUT_SECONDS", "10")
    get_settings.cache_clear()
    async with stub_server(lambda request: json_response({})) as server:
        port = int(server.url.rpartition(":")[2])
        with socket.socket() as silent, socket.socket() as first:
            silent.bind(("127.0.0.2", port))
            silent.listen(0)  # the queue has space for one connection only, which is never accepted
            first.connect(("127.0.0.2", port))

            async def resolve(*_: object, **__: object) -> Any:
                return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in ("127.0.0.2", "127.0.0.1")]

            monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
            async with client(f"http://sonarr.example:{port}").open() as opened:
                assert await opened.get("/") == {}


async def test_proxies_in_the_environment_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert await get(json_response({})) == {}


def _handler(response: Handler | StubResponse) -> Handler:
    if not isinstance(response, StubResponse):
        return response

    def respond(request: StubRequest) -> StubResponse:
        return response

    return respond


async def _respond_with_empty_object(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
    await writer.drain()
    writer.close()


def _self_signed(folder: Path) -> ssl.SSLContext:
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *files, *subject]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context
