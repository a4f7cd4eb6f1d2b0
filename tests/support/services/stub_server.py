"""A real HTTP server on loopback whose responses a test chooses, down to single bytes."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, urlsplit

REASONS = {200: "OK", 204: "No Content", 301: "Moved Permanently", 302: "Found", 401: "Unauthorized", 403: "Forbidden"}


@dataclass(frozen=True)
class StubRequest:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class StubResponse:
    body: bytes = b""
    status: int = 200
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    length: int | None = None  # a Content-Length that is not the body's; the connection ends after it
    hangs: bool = False  # nothing is sent


Handler = Callable[[StubRequest], StubResponse]


def json_response(content: object, status: int = 200) -> StubResponse:
    return StubResponse(json.dumps(content).encode(), status)


def html_page(title: str, status: int = 200) -> StubResponse:
    html = f"<!doctype html><html><head><title>{title}</title></head><body></body></html>"
    return StubResponse(html.encode(), status, "text/html; charset=utf-8")


def text_response(content: str, status: int = 200) -> StubResponse:
    return StubResponse(content.encode(), status, "text/plain")


@dataclass
class StubServer:
    handler: Handler
    url: str = ""
    requests: list[StubRequest] = field(default_factory=list[StubRequest])
    connections: dict[asyncio.Task[None], asyncio.StreamWriter] = field(default_factory=dict, repr=False)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection
        self.connections[connection] = writer
        try:
            while request := await _read(reader):
                self.requests.append(request)
                response = self.handler(request)
                if response.hangs:
                    await reader.read()  # until the client gives up
                    break
                writer.write(_head(response) + response.body)
                await writer.drain()
                if response.length is not None:
                    break
        except ConnectionError:
            pass  # the client has disconnected
        finally:
            writer.close()


@asynccontextmanager
async def stub_server(handler: Handler) -> AsyncGenerator[StubServer]:
    stub = StubServer(handler)
    async with await asyncio.start_server(stub.serve, "127.0.0.1", 0) as listener:
        stub.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        yield stub
        for writer in stub.connections.values():
            writer.close()
        await asyncio.gather(*stub.connections)


async def _read(reader: asyncio.StreamReader) -> StubRequest | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.rstrip().split("\r\n")
    method, target, _ = first.split(" ")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    parts = urlsplit(target)
    return StubRequest(method, parts.path, dict(parse_qsl(parts.query, keep_blank_values=True)), headers, body)


def _head(response: StubResponse) -> bytes:
    length = len(response.body) if response.length is None else response.length
    headers = {"Content-Type": response.content_type, "Content-Length": str(length), **response.headers}
    if response.length is not None:
        headers["Connection"] = "close"  # a client that is not told may use the connection again while it ends
    lines = [f"HTTP/1.1 {response.status} {REASONS.get(response.status, 'Status')}", *map(": ".join, headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()
