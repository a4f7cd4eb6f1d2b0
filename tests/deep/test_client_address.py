"""Whom a request is counted for: its caller's address, which nobody but a trusted proxy may name for another."""

from collections.abc import Generator, Iterator, Sequence

import httpx
import pytest

from tests.support.platform import Platform, running_platform
from tests.support.waiting import TIMEOUT

pytestmark = [pytest.mark.platform, pytest.mark.deep]
LIMIT = 5
PROXY = "127.0.0.200"


@pytest.fixture(scope="module")
def platform() -> Generator[Platform]:
    settings = {
        "mlflow.enabled": "false",
        "limits.enabled": "true",
        "limits.general": f"{LIMIT}/hour",
        "serve.trusted_proxies": f"[{PROXY}]",
    }
    with running_platform(settings) as platform:
        yield platform


@pytest.mark.parametrize(
    ("address", "header"),
    [
        ("127.0.0.2", "X-Forwarded-For: 192.0.2.{}"),
        ("127.0.0.3", "X-Forwarded-For: 192.0.2.{}, 127.0.0.1"),
        ("127.0.0.4", f"X-Forwarded-For: 192.0.2.{{}}, {PROXY}"),
        ("127.0.0.5", "x-forwarded-for: [2001:db8:{}::1]:80"),
        ("127.0.0.6", "Forwarded: for=192.0.2.{}"),
        ("127.0.0.7", "X-Real-IP: 192.0.2.{}"),
        ("127.0.0.1", "X-Forwarded-For: 192.0.2.{}"),
    ],
)
def test_a_made_up_address_buys_no_further_requests(platform: Platform, address: str, header: str) -> None:
    headers = [header.format(number) for number in range(LIMIT + 1)]
    assert list(statuses(platform, address, headers)) == [200] * LIMIT + [429]


def test_a_trusted_proxy_says_whom_it_asks_for(platform: Platform) -> None:
    different = [f"X-Forwarded-For: 198.51.100.{number}" for number in range(LIMIT + 1)]
    assert list(statuses(platform, PROXY, different)) == [200] * (LIMIT + 1)
    # What the caller told the proxy stands before what the proxy saw.
    same = [f"X-Forwarded-For: 192.0.2.{number}, 203.0.113.9" for number in range(LIMIT + 1)]
    assert list(statuses(platform, PROXY, same)) == [200] * LIMIT + [429]


def statuses(platform: Platform, address: str, headers: Sequence[str]) -> Iterator[int]:
    """What becomes of one request after another, each sent from this address with one of these headers."""
    transport = httpx.HTTPTransport(local_address=address)
    with httpx.Client(transport=transport, base_url=platform.url, timeout=TIMEOUT) as client:
        for header in headers:
            name, _, value = header.partition(": ")
            yield client.get("/api/v1/ping", headers={name: value}).status_code
