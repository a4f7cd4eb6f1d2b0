"""A real HTTP server on loopback that answers what it is told to, byte by byte where that matters."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, urlsplit

REASONS = {200: "OK", 204: "No Content", 301: "Moved Permanently", 302: "Found", 401: "Unauthorized", 403: "Forbidden"}


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Reply:
    body: bytes = b""
    status: int = 200
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    length: int | None = None  # what it says it will send, if that is not so
    never: bool = False  # it is not sent at all


Handler = Callable[[Asked], Reply]


def telling(content: object, status: int = 200) -> Reply:
    return Reply(json.dumps(content).encode(), status)


def page(title: str, status: int = 200) -> Reply:
    html = f"<!doctype html><html><head><title>{title}</title></head><body></body></html>"
    return Reply(html.encode(), status, "text/html; charset=utf-8")


def text(words: str, status: int = 200) -> Reply:
    return Reply(words.encode(), status, "text/plain")


@dataclass
class StandIn:
    answer: Handler
    url: str = ""
    asked: list[Asked] = field(default_factory=list[Asked])
    conversations: dict[asyncio.Task[None], asyncio.StreamWriter] = field(default_factory=dict, repr=False)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conversation = asyncio.current_task()
        assert conversation
        self.conversations[conversation] = writer
        try:
            while asked := await _read(reader):
                self.asked.append(asked)
                reply = self.answer(asked)
                if reply.never:
                    await reader.read()  # until the other side has had enough
                    break
                writer.write(_head(reply) + reply.body)
                await writer.drain()
                if reply.length is not None:
                    break
        except ConnectionError:
            pass  # the other side has had enough
        finally:
            writer.close()


@asynccontextmanager
async def standing_in(answer: Handler) -> AsyncGenerator[StandIn]:
    stand_in = StandIn(answer)
    async with await asyncio.start_server(stand_in.serve, "127.0.0.1", 0) as server:
        stand_in.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield stand_in
        for writer in stand_in.conversations.values():
            writer.close()
        await asyncio.gather(*stand_in.conversations)


async def _read(reader: asyncio.StreamReader) -> Asked | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.rstrip().split("\r\n")
    method, target, _ = first.split(" ")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    parts = urlsplit(target)
    return Asked(method, parts.path, dict(parse_qsl(parts.query, keep_blank_values=True)), headers, body)


def _head(reply: Reply) -> bytes:
    length = len(reply.body) if reply.length is None else reply.length
    headers = {"Content-Type": reply.content_type, "Content-Length": str(length), **reply.headers}
    lines = [f"HTTP/1.1 {reply.status} {REASONS.get(reply.status, 'Status')}", *map(": ".join, headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()
