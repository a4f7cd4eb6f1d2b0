"""The address that a request is counted for. Only a trusted proxy may name another address than its own."""

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
def test_a_forged_address_does_not_avoid_the_rate_limit(platform: Platform, address: str, header: str) -> None:
    headers = [header.format(number) for number in range(LIMIT + 1)]
    assert list(statuses(platform, address, headers)) == [200] * LIMIT + [429]


def test_the_address_from_a_trusted_proxy_is_counted(platform: Platform) -> None:
    different = [f"X-Forwarded-For: 198.51.100.{number}" for number in range(LIMIT + 1)]
    assert list(statuses(platform, PROXY, different)) == [200] * (LIMIT + 1)
    # The proxy appends the address that it saw to what the caller sent.
    same = [f"X-Forwarded-For: 192.0.2.{number}, 203.0.113.9" for number in range(LIMIT + 1)]
    assert list(statuses(platform, PROXY, same)) == [200] * LIMIT + [429]


def statuses(platform: Platform, address: str, headers: Sequence[str]) -> Iterator[int]:
    """Send one request for each header from this address, and yield the status codes."""
    transport = httpx.HTTPTransport(local_address=address)
    with httpx.Client(transport=transport, base_url=platform.url, timeout=TIMEOUT) as client:
        for header in headers:
            name, _, value = header.partition(": ")
            yield client.get("/api/v1/ping", headers={name: value}).status_code
