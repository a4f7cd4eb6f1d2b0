"""Which addresses services may have.

A name is looked up when it is connected to, and the address that was looked at is the one that is connected to: a name
that means something else a moment later gains nothing.
"""

import asyncio
import ipaddress
import re
import socket
from contextlib import suppress
from urllib.parse import urlsplit

import httpx

from cluster.errors import InvalidRequest
from cluster.ssrf import IpAddress, is_forbidden

DEFAULT_PORTS = {"http": 80, "https": 443}


class InvalidServiceUrl(InvalidRequest):
    """A service cannot have such an address."""

    code = "INVALID_SERVICE_URL"


class ForbiddenAddress(httpx.ConnectError):
    """A name leads to an address that no service may have."""


def validate_url(url: str) -> str:
    """The address of a service as it is kept, if a service may have it."""
    if not url.isprintable() or re.search(r"[\s\\]", url):
        raise InvalidServiceUrl("The url has characters that no address has.")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL):
        raise InvalidServiceUrl("The url cannot be read.") from None
    if parts.scheme not in DEFAULT_PORTS or not host or port == 0:
        raise InvalidServiceUrl("The url must be such as http://192.168.1.100:8989 or https://sonarr.example.")
    if "@" in parts.netloc:
        raise InvalidServiceUrl("Credentials do not belong into the url: send a key as api_key.")
    if parts.query or parts.fragment or url.endswith(("?", "#")):
        raise InvalidServiceUrl("The url of a service has no ? and no # in it.")
    address = _parse_address(host)
    if address and is_forbidden(address):
        raise InvalidServiceUrl(f"No service may be at {host}.")
    return url.rstrip("/")


class CheckedTransport(httpx.AsyncBaseTransport):
    """Looks up the name in a request, and connects to none of its addresses if one of them is forbidden."""

    def __init__(self, transport: httpx.AsyncBaseTransport) -> None:
        self._transport = transport

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.raw_host.decode()
        addresses = await _resolve_host(host, request.url.port or DEFAULT_PORTS[request.url.scheme])
        original_url = request.url
        # The name still says whose certificate is wanted; the header Host was set from it long ago.
        request.extensions = {
            **request.extensions,
            "sni_hostname": host,
            "timeout": _split_connect_timeout(request, len(addresses)),
        }
        try:
            for address in addresses[:-1]:
                request.url = original_url.copy_with(host=address)
                # Such as ::1, where only 127.0.0.1 is listened at, or what a firewall lets nobody reach.
                with suppress(httpx.ConnectError, httpx.ConnectTimeout):
                    return await self._transport.handle_async_request(request)
            request.url = original_url.copy_with(host=addresses[-1])
            return await self._transport.handle_async_request(request)
        finally:
            request.url = original_url  # cookies belong to the name

    async def aclose(self) -> None:
        await self._transport.aclose()


def _split_connect_timeout(request: httpx.Request, address_count: int) -> dict[str, float]:
    """The times that a request may take, so that each of its addresses has a part of the time to connect."""
    timeouts: dict[str, float] = request.extensions["timeout"]
    return {**timeouts, "connect": timeouts["connect"] / address_count}


async def _resolve_host(host: str, port: int) -> list[str]:
    try:
        address_infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise httpx.ConnectError(f"there is no machine named {host}") from error
    addresses = list(dict.fromkeys(str(info[4][0]) for info in address_infos))
    if any(is_forbidden(address) for address in addresses):
        raise ForbiddenAddress(f"{host} is an address that no service may have")
    return addresses


def _parse_address(host: str) -> IpAddress | None:
    """The address that a host is, in any of the ways in which a system's resolver reads one (127.1, 0x7f000001)."""
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        pass
    try:
        return ipaddress.ip_address(socket.inet_aton(host))
    except (OSError, UnicodeError):
        return None
