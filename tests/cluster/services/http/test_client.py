"""What a service, its network or whatever else is there may do: an error of ours for each, and no key in it."""

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
    """A client wants to know how long it may wait."""


def client(url: str, name: str = "sonarr", **more: Any) -> Client:
    return Client(Connection("Ours", find_connector(name), url, KEY, **more))


async def get(answer: Handler | StubResponse, name: str = "sonarr") -> Any:
    async with stub_server(_handler(answer)) as server, client(server.url, name).open() as ours:
        return await ours.get("/api/v3/thing", page=1)


MISBEHAVIOUR: dict[str, tuple[Handler | StubResponse, type[ServiceError], str]] = {
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


@pytest.mark.parametrize("sort", MISBEHAVIOUR)
async def test_each_misbehaviour_has_its_error(sort: str) -> None:
    answer, kind, words = MISBEHAVIOUR[sort]
    with pytest.raises(kind) as refused:
        await get(answer)
    assert type(refused.value) is kind
    assert words in refused.value.message
    assert "Ours" in refused.value.message
    assert refused.value.status in {400, 404, 503}


@pytest.mark.parametrize("status", [200, 400, 500])
async def test_what_a_service_repeats_of_the_key_is_masked_wherever_it_stands(status: int) -> None:
    def repeat(request: StubRequest) -> StubResponse:
        return json_response({"status": False, "error": f"nothing for {request.query['apikey']}"}, status)

    with pytest.raises(ServiceError, match=r"nothing for \*{8}") as refused:
        await get(repeat, "sabnzbd")
    assert KEY not in "".join(traceback.format_exception(refused.value))


async def test_an_address_of_the_sixth_version_is_one_too() -> None:
    async with (
        await asyncio.start_server(_hello, "::1", 0) as server,
        client(f"http://[::1]:{server.sockets[0].getsockname()[1]}").open() as ours,
    ):
        assert await ours.get("/") == {}


async def test_an_error_with_status_200_is_an_error() -> None:
    with pytest.raises(Refused, match="item does not exist"):
        await get(json_response({"status": False, "error": "item does not exist"}), "sabnzbd")
    with pytest.raises(Unauthorized, match="API Key Incorrect"):
        await get(json_response({"status": False, "error": "API Key Incorrect"}), "sabnzbd")
    with pytest.raises(Refused, match="bad_data"):
        await get(json_response({"status": "error", "errorType": "bad_data", "error": "bad_data: parse"}), "prometheus")


async def test_nobody_at_the_address() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        async with client(f"http://127.0.0.1:{taken.getsockname()[1]}").open() as ours:
            with pytest.raises(Unreachable, match="Ours cannot be reached"):
                await ours.get("/")


async def test_a_name_that_nobody_has() -> None:
    async with client("http://no-such-machine.invalid").open() as ours:
        with pytest.raises(Unreachable, match="cannot be resolved"):
            await ours.get("/")


async def test_silence_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_SERVICES__TIMEOUT_SECONDS", "0.2")
    get_settings.cache_clear()
    with pytest.raises(Unreachable, match=r"within 0\.2 seconds"):
        await get(StubResponse(hangs=True))


async def test_dripping_does_not_outwit_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, and the whole never."""
    monkeypatch.setenv("FORGEARR_SERVICES__TIMEOUT_SECONDS", "2")
    get_settings.cache_clear()
    gone = asyncio.Event()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            while not writer.is_closing() and not reader.at_eof():
                writer.write(b" ")
                await asyncio.wait([asyncio.ensure_future(reader.read(1))], timeout=0.02)
        finally:
            writer.close()
            gone.set()

    async with await asyncio.start_server(drip, "127.0.0.1", 0) as server:
        async with client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}").open() as ours:
            with pytest.raises(Unreachable, match="within"):
                await ours.get("/")
        async with asyncio.timeout(TIMEOUT):
            await gone.wait()


async def test_a_long_answer_is_read_and_a_longer_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len((await get(StubResponse(b'{"a": "' + b"x" * LONG + b'"}')))["a"]) == LONG
    monkeypatch.setattr(clients, "MAX_BYTES", 1024 * 1024)
    with pytest.raises(BadResponse, match="more than 1 MiB"):
        await get(StubResponse(b'{"a": "' + b"x" * LONG + b'"}'))
    packed = gzip.compress(b'{"a": "' + b"x" * LONG + b'"}')
    assert len(packed) < 1024 * 1024
    with pytest.raises(BadResponse, match="more than 1 MiB"):
        await get(StubResponse(packed, headers={"Content-Encoding": "gzip"}))


async def test_a_redirect_on_the_same_server_is_followed_with_the_key() -> None:
    def answer(request: StubRequest) -> StubResponse:
        if request.path == "/sonarr/there":
            return json_response({"key": request.headers["x-api-key"]})
        return StubResponse(b"", 301, headers={"Location": "/sonarr/there"})

    assert await get(answer) == {"key": KEY}


async def test_no_redirect_of_a_change_is_followed() -> None:
    async with (
        stub_server(lambda request: StubResponse(b"", 302, headers={"Location": "/there"})) as server,
        client(server.url).open() as ours,
    ):
        with pytest.raises(BadResponse, match="set it as the url"):
            await ours.post("/here", {"a": 1})
    assert [request.path for request in server.requests] == ["/here"]


@pytest.mark.parametrize(("method", "times"), [("get", 2), ("get_once", 1), ("post", 1), ("put", 1), ("delete", 1)])
async def test_only_what_changes_nothing_is_sent_again(method: str, times: int) -> None:
    """The connection breaks after the first request, whose answer is not whole."""
    replies = iter([StubResponse(b"{", length=100), json_response({"fine": True})])
    async with stub_server(lambda request: next(replies)) as server, client(server.url).open() as ours:
        call: Callable[[str], Any] = getattr(ours, method)
        if times == 2:
            assert await call("/thing") == {"fine": True}
        else:
            with pytest.raises(Unreachable):
                await call("/thing")
    assert len(server.requests) == times


async def test_what_is_sent_arrives_and_no_answer_is_one() -> None:
    name = 'Größe "x" 🎬'
    async with stub_server(lambda request: StubResponse(b"", 204)) as server, client(server.url).open() as ours:
        assert await ours.put("/api/v3/movie", {"title": name}, moveFiles=True) is None
    (request,) = server.requests
    assert (json.loads(request.body), request.query) == ({"title": name}, {"moveFiles": "true"})


async def test_words_are_one_short_line() -> None:
    with pytest.raises(Refused) as refused:
        await get(text_response("no\n" * 5000, 400))
    assert len(refused.value.message) < 400
    assert "\n" not in refused.value.message


@pytest.mark.parametrize("verify", [True, False])
async def test_a_certificate_of_ones_own_is_taken_only_when_told_so(tmp_path: Path, verify: bool) -> None:
    async with await asyncio.start_server(_hello, "127.0.0.1", 0, ssl=_own_certificate(tmp_path)) as server:
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with client(url, verify_tls=verify).open() as ours:
            if verify:
                with pytest.raises(Unreachable, match="set verify_tls to false"):
                    await ours.get("/")
            else:
                assert await ours.get("/") == {}


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
def test_a_home_may_be_anywhere(url: str) -> None:
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
def test_no_service_is_where_clouds_keep_secrets_or_nowhere(url: str) -> None:
    with pytest.raises(InvalidServiceUrl):
        validate_url(url)


async def test_a_name_that_leads_to_metadata_is_not_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that has a good address beside it: which of them is used would be luck."""
    async with stub_server(lambda request: json_response({})) as server:
        port = int(server.url.rpartition(":")[2])
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in ("127.0.0.1", "169.254.169.254")]

        async def look_up(*_: object, **__: object) -> Any:
            return found

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", look_up)
        async with client(f"http://rebound.example:{port}").open() as ours:
            with pytest.raises(Unreachable, match="no service may have"):
                await ours.get("/")
            assert server.requests == []
            found.pop()
            assert await ours.get("/") == {}
        assert server.requests[0].headers["host"] == f"rebound.example:{port}"


async def test_of_several_addresses_the_one_that_listens_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async with stub_server(lambda request: json_response({})) as server:
        port = int(server.url.rpartition(":")[2])

        async def look_up(*_: object, **__: object) -> Any:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in ("127.0.0.2", "127.0.0.1")]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", look_up)
        async with client(f"http://sonarr.example:{port}").open() as ours:
            assert await ours.get("/") == {}


async def test_an_address_that_swallows_all_hides_no_other(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("FORGEARR_SERVICES__TIMEOUT_SECONDS", "10")
    get_settings.cache_clear()
    async with stub_server(lambda request: json_response({})) as server:
        port = int(server.url.rpartition(":")[2])
        with socket.socket() as silent, socket.socket() as first:
            silent.bind(("127.0.0.2", port))
            silent.listen(0)  # it has room for one that nobody accepts, and none for a second
            first.connect(("127.0.0.2", port))

            async def look_up(*_: object, **__: object) -> Any:
                return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in ("127.0.0.2", "127.0.0.1")]

            monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", look_up)
            async with client(f"http://sonarr.example:{port}").open() as ours:
                assert await ours.get("/") == {}


async def test_proxies_of_the_environment_do_not_hear_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert await get(json_response({})) == {}


def _handler(answer: Handler | StubResponse) -> Handler:
    if not isinstance(answer, StubResponse):
        return answer

    def always(request: StubRequest) -> StubResponse:
        return answer

    return always


async def _hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
    await writer.drain()
    writer.close()


def _own_certificate(folder: Path) -> ssl.SSLContext:
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *files, *subject]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context
