"""A server that repeats in each answer all that it was sent, as broken and malicious services do with secrets.

The first part of the path chooses the kind of answer: `/json`, `/text`, `/page`, `/redirect`, or `/realm`, which asks
for credentials first.
"""

import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import quote


class EchoingServer(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.heard: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: EchoingServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode(errors="replace")
        heard = " ".join([self.path, *self.headers.values(), body])
        self.server.heard.append(heard)
        headers: dict[str, str] = {"X-Error-Message": re.sub(r"\s+", " ", heard)}
        match self.path.split("/")[1]:
            case "realm" if "Authorization" not in self.headers:
                status, content, headers = 401, heard, {"WWW-Authenticate": 'Basic realm="git"'}
            case "json":
                status, content = 500, json.dumps({"message": f"nothing for {heard}"})
            case "page":
                status, content = 502, f"<!doctype html><title>{heard}</title>"
            case "redirect":
                status, content, headers = 302, heard, {"Location": f"http://elsewhere.example/?x={quote(heard)}"}
            case _:
                status, content = 403, heard
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content.encode())), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content.encode())


@contextmanager
def echoing_server() -> Generator[EchoingServer]:
    with EchoingServer() as server:
        thread = Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
