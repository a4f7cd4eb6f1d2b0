"""How long others wait while clients send the worst bodies: `GET /api/v1/ping`, next to the same when nobody does.

The clients are a process of their own: `python -m tests.bench.hostile URL ATTACK KEY`.
"""

import http.client
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from threading import Thread
from urllib.parse import urlsplit

import httpx

from tests.bench.figures import Figure, percentile
from tests.support.platform import BINARIES, Platform
from tests.support.waiting import TIMEOUT

GROUP = "Others, while 8 clients do their worst"
CLIENTS = 8
SECONDS = 15
PAUSE_SECONDS = 0.005
MEBIBYTE = 1024 * 1024
MANY_LISTS = b"[" + b"[]," * (MEBIBYTE // 3 - 2) + b"[]]"
"""Of a mebibyte. Nothing costs a parser more."""
MANY_FIELDS = b"a=1&" * (MEBIBYTE // 4)
JSON, FORM = "application/json", "application/x-www-form-urlencoded"


def _lists(mebibytes: int) -> bytes:
    return b"[" + b",".join([MANY_LISTS] * mebibytes) + b"]"


ATTACKS: dict[str, tuple[str, str, str, bool]] = {
    "strangers: 4 MiB of lists to a route for users": ("POST", "/api/v1/jobs", "lists 4", False),
    "strangers: 4 MiB of lists as a login": ("POST", "/api/v1/auth/login", "lists 4", False),
    "strangers: 64 KiB of lists as a login": ("POST", "/api/v1/auth/login", "lists 0", False),
    "strangers: 4 MiB of form fields to a webhook": ("POST", "/webhooks/github", "form 4", False),
    "users: 31 MiB of lists": ("POST", "/api/v1/jobs", "lists 31", True),
    "users: 98,000 wrong values": ("POST", "/api/training/sessions/x/start", "wrong", True),
    "users: 31 MiB of text": ("POST", "/v1/chat/completions", "text 31", True),
    "users: a list of 100 jobs with 990 kB each": ("GET", "/api/v1/jobs?limit=100", "", True),
}
"""By name: method, path, body, and whether a credential comes with it."""


def body(description: str) -> tuple[bytes, str]:
    kind, _, size = description.partition(" ")
    match kind:
        case "lists":
            return (_lists(int(size)) if int(size) else MANY_LISTS[:64_999] + b"[]]"), JSON
        case "form":
            return MANY_FIELDS * int(size), FORM
        case "wrong":
            ids = b"[" + b'"",' * 49_000 + b'""]'
            return b'{"prompt_ids":' + ids + b',"data":{"prompts":{"ids":' + ids + b"}}}", JSON
        case "text":
            message = b'{"role":"user","content":"' + b"x" * (int(size) * MEBIBYTE) + b'"}'
            return b'{"model":"none","messages":[' + message + b"]}", JSON
        case _:
            return b"", JSON


def figures(platform: Platform) -> list[Figure]:
    key = _add_user(platform)
    with httpx.Client(base_url=platform.url, headers={"X-API-Key": key}, timeout=TIMEOUT) as user:
        for _ in range(100):
            job = {"kind": "probe", "spec": {"payload": "x" * 990_000}, "run_after": "2099-01-01T00:00:00Z"}
            user.post("/api/v1/jobs", json=job).raise_for_status()
    quiet = _ping_p99(platform.url)
    found: list[Figure] = []
    for name in ATTACKS:
        with _attackers(platform, name, key):
            p99 = _ping_p99(platform.url)
        found.append(Figure(GROUP, f"GET /api/v1/ping, p99. {name}", "ms", p99, "nobody", quiet, p99 / quiet))
    return found


def _add_user(platform: Platform) -> str:
    command = [str(BINARIES / "forgearr"), "user", "add", "uli@example.com", "--username", "uli", "--password-stdin"]
    subprocess.run(command, input="pass of uli\n", env=platform.environment, text=True, check=True, timeout=TIMEOUT)
    return platform.cli("key", "create", "bench", "--user", "uli@example.com").stdout.strip()


def _ping_p99(url: str) -> float:
    """In milliseconds, of one client that asks again and again."""
    latencies: list[float] = []
    with httpx.Client(base_url=url, timeout=TIMEOUT) as client:
        client.get("/api/v1/ping")  # connects
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            began = time.perf_counter()
            client.get("/api/v1/ping").raise_for_status()
            latencies.append(time.perf_counter() - began)
            time.sleep(PAUSE_SECONDS)
    return percentile(latencies, 99) * 1000


@contextmanager
def _attackers(platform: Platform, name: str, key: str) -> Generator[None]:
    command = [sys.executable, "-m", "tests.bench.hostile", platform.url, name, key]
    process = subprocess.Popen(command, env=platform.environment, stdout=subprocess.PIPE)
    assert process.stdout
    print(process.stdout.readline().decode().strip())
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _attack(url: str, name: str, key: str) -> None:
    """Send the same request again and again, and say so after the first response."""
    method, path, description, as_user = ATTACKS[name]
    content, content_type = body(description)
    headers = {"Content-Type": content_type} | ({"X-API-Key": key} if as_user else {})
    address = urlsplit(url).netloc
    is_first = True
    while True:
        connection = http.client.HTTPConnection(address, timeout=TIMEOUT)
        # A server may answer and close before it has the whole body.
        with suppress(OSError, http.client.HTTPException):
            connection.request(method, path, content, headers)
            response = connection.getresponse()
            response.read()
            if is_first:
                sys.stdout.write(f"{name} {response.status}\n")  # at once, because the threads share the output
                sys.stdout.flush()
                is_first = False
        connection.close()


if __name__ == "__main__":
    for _ in range(CLIENTS):
        Thread(target=_attack, args=sys.argv[1:4]).start()
