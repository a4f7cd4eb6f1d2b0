"""A news server on loopback, and a real SABnzbd that downloads from it.

Posts are yEnc articles. The server has them or, as happens on Usenet, has lost them. It runs in its own threads, so
that it can live as long as a module's SABnzbd, independent of event loops.
"""

import re
import secrets
import socketserver
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import escape, quoteattr
from zlib import crc32

import httpx

from tests.support.services.real_services import RunningService
from tests.support.waiting import TIMEOUT, eventually

CONNECTIONS = 2
LINE = 128
SHIFTED = bytes((value + 42) % 256 for value in range(256))
CRITICAL = re.compile(rb"[\0\n\r=]")
END = b"\r\n.\r\n"


@dataclass
class NewsServer:
    port: int = 0
    articles: dict[str, bytes] = field(default_factory=dict[str, bytes], repr=False)
    lost: dict[str, bytes] = field(default_factory=dict[str, bytes], repr=False)
    open: threading.Event = field(default_factory=threading.Event, repr=False)
    sent: list[int] = field(default_factory=list[int], repr=False)  # the size of each message
    waiting: set[socketserver.StreamRequestHandler] = field(
        default_factory=set[socketserver.StreamRequestHandler], repr=False
    )

    def post(self, name: str, content: bytes, *, parts: int = 4, lost: int = 0) -> str:
        """Post a file; returns its NZB. The server has lost the first `lost` of its articles."""
        length = -(-len(content) // parts)
        segments: list[str] = []
        for number, begin in enumerate(range(0, len(content), length), 1):
            article, key = _article(name, content, begin, length, number), f"{secrets.token_hex(8)}@forgearr.test"
            (self.articles if number > lost else self.lost)[key] = article
            segments.append(f'<segment bytes="{len(article)}" number="{number}">{key}</segment>')
        subject = quoteattr(f'"{name}" yEnc (1/{len(segments)})')
        return (
            '<?xml version="1.0" encoding="UTF-8"?><nzb xmlns="http://www.newzbin.com/DTD/2003/nzb">'
            f'<file poster="ada" date="{int(time.time())}" subject={subject}>'
            f"<groups><group>{escape('alt.binaries.test')}</group></groups>"
            f"<segments>{''.join(segments)}</segments></file></nzb>"
        )

    @contextmanager
    def paused(self) -> Generator[None]:
        """Inside the block the server sends no articles."""
        self.open.clear()
        try:
            yield
        finally:
            self.open.set()

    def restore_lost(self) -> None:
        """Make the server have all posted articles from now on."""
        self.articles |= self.lost
        self.lost.clear()


@contextmanager
def running_news_server() -> Generator[NewsServer]:
    """A news server that runs during the block."""
    news = NewsServer()
    news.open.set()

    class Connection(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            _serve(news, self)

    with _Server(("127.0.0.1", 0), Connection) as server:
        news.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield news
        news.open.set()
        server.shutdown()


def add_news_server(sabnzbd: RunningService, news: NewsServer) -> None:
    """Make SABnzbd download from this server."""
    server = {"name": "Loopback", "host": "127.0.0.1", "port": news.port, "connections": CONNECTIONS}
    call_api(sabnzbd, "set_config", section="servers", **server, enable=1, ssl=0)


def add_download(sabnzbd: RunningService, nzb: str, name: str, **options: Any) -> str:
    """Add an NZB to SABnzbd; returns the id of the download."""
    files = {"nzbfile": (f"{name}.nzb", nzb.encode(), "application/x-nzb")}
    parameters = {"mode": "addfile", "output": "json", "apikey": sabnzbd.key, "nzbname": name, **options}
    body = httpx.post(f"{sabnzbd.url}/api", data=parameters, files=files, timeout=TIMEOUT).raise_for_status().json()
    (nzo_id,) = body["nzo_ids"]
    return nzo_id


def finished_download(sabnzbd: RunningService, nzo_id: str) -> dict[str, Any]:
    """Wait until a download has completed or failed; returns its slot in the history."""

    def slot() -> dict[str, Any] | None:
        slots = call_api(sabnzbd, "history", nzo_ids=nzo_id)["history"]["slots"]
        # SABnzbd may report a download as completed while it still moves the files. It has no storage then.
        is_over = len(slots) == 1 and slots[0]["status"] in {"Completed", "Failed"} and slots[0]["storage"]
        return slots[0] if is_over else None

    return eventually(slot)


def wait_until_stalled(sabnzbd: RunningService, news: NewsServer) -> None:
    """Wait until SABnzbd waits for articles and measures a speed of 0."""
    eventually(lambda: len(news.waiting) == CONNECTIONS)
    eventually(lambda: call_api(sabnzbd, "server_stats")["total"] == sum(news.sent))
    eventually(lambda: float(call_api(sabnzbd, "queue")["queue"]["kbpersec"]) == 0)


def call_api(sabnzbd: RunningService, mode: str, **parameters: Any) -> Any:
    """Call SABnzbd's own API, without Forgearr."""
    query = {"mode": mode, "output": "json", "apikey": sabnzbd.key, **parameters}
    return httpx.get(f"{sabnzbd.url}/api", params=query, timeout=TIMEOUT).raise_for_status().json()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True


def _serve(news: NewsServer, connection: socketserver.StreamRequestHandler) -> None:
    def send(content: bytes) -> None:
        connection.wfile.write(content)
        news.sent.append(len(content))

    try:
        send(b"200 Welcome\r\n")
        while line := connection.rfile.readline().decode("latin-1").split():
            match line[0].upper():
                case "QUIT":
                    return
                case "BODY" | "ARTICLE" | "HEAD" | "STAT" as command:
                    news.waiting.add(connection)
                    news.open.wait()
                    news.waiting.discard(connection)
                    send(_respond(news, command, line[1].strip("<>")))
                case "GROUP":
                    send(b"211 1 1 1 group\r\n")
                case _:
                    send(b"500 What?\r\n")
    except ConnectionError:
        pass  # the client has disconnected


def _respond(news: NewsServer, command: str, key: str) -> bytes:
    article = news.articles.get(key)
    if article is None:
        return b"430 No such article\r\n"
    head = f"Message-ID: <{key}>\r\n".encode()
    match command:
        case "STAT":
            return f"223 0 <{key}>\r\n".encode()
        case "HEAD":
            return f"221 0 <{key}>\r\n".encode() + head + b".\r\n"
        case "ARTICLE":
            return f"220 0 <{key}>\r\n".encode() + head + b"\r\n" + article + END
        case _:
            return f"222 0 <{key}>\r\n".encode() + article + END


def _article(name: str, content: bytes, begin: int, length: int, number: int) -> bytes:
    part = content[begin : begin + length]
    total = -(-len(content) // length)
    lines = [_encoded(part[start : start + LINE]) for start in range(0, len(part), LINE)]
    return b"\r\n".join(
        [
            f"=ybegin part={number} total={total} line={LINE} size={len(content)} name={name}".encode(),
            f"=ypart begin={begin + 1} end={begin + len(part)}".encode(),
            *lines,
            f"=yend size={len(part)} part={number} pcrc32={crc32(part):08x}".encode(),
        ]
    )


def _encoded(line: bytes) -> bytes:
    escaped = CRITICAL.sub(lambda match: bytes((ord("="), (match[0][0] + 64) % 256)), line.translate(SHIFTED))
    return b"." + escaped if escaped.startswith(b".") else escaped
