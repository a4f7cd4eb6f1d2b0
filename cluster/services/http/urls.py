"""Validate the URLs of services, and refuse connections to forbidden addresses.

A host name is resolved when a connection is opened, and the connection goes to the address that was checked. A name
that resolves differently a moment later has no effect.
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
    """The url of the service is not valid."""

    code = "INVALID_SERVICE_URL"


class ForbiddenAddress(httpx.ConnectError):
    """A name resolves to an address that no service may have."""


def validate_url(url: str) -> str:
    """Validate the URL of a service, and return it in the form that is stored."""
    if not url.isprintable() or re.search(r"[\s\\]", url):
        raise InvalidServiceUrl("The url has characters that no URL may have.")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL):
        raise InvalidServiceUrl("The url cannot be parsed.") from None
    if parts.scheme not in DEFAULT_PORTS or not host or port == 0:
        raise InvalidServiceUrl("The url must look like http://192.168.1.100:8989 or https://sonarr.example.")
    if "@" in parts.netloc:
        raise InvalidServiceUrl("The url must not contain credentials: send a key as api_key.")
    if parts.query or parts.fragment or url.endswith(("?", "#")):
        raise InvalidServiceUrl("The url of a service must not contain ? or #.")
    address = _parse_address(host)
    if address and is_forbidden(address):
        raise InvalidServiceUrl(f"No service may have the address {host}.")
    return url.rstrip("/")


class CheckedTransport(httpx.AsyncBaseTransport):
    """Resolves the host of a request. If one of its addresses is forbidden, it connects to none of them."""

    def __init__(self, transport: httpx.AsyncBaseTransport) -> None:
        self._transport = transport

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.raw_host.decode()
        addresses = await _resolve_host(host, request.url.port or DEFAULT_PORTS[request.url.scheme])
        original_url = request.url
        # The certificate is still checked for the name. The header Host was set before.
        request.extensions = {
            **request.extensions,
            "sni_hostname": host,
            "timeout": _split_connect_timeout(request, len(addresses)),
        }
        try:
            for address in addresses[:-1]:
                request.url = original_url.copy_with(host=address)
                # ::1 fails if the service listens on 127.0.0.1 only; a firewall may block another address.
                with suppress(httpx.ConnectError, httpx.ConnectTimeout):
                    return await self._transport.handle_async_request(request)
            request.url = original_url.copy_with(host=addresses[-1])
            return await self._transport.handle_async_request(request)
        finally:
            request.url = original_url  # cookies are stored for the name

    async def aclose(self) -> None:
        await self._transport.aclose()


def _split_connect_timeout(request: httpx.Request, address_count: int) -> dict[str, float]:
    """Return the timeouts of a request, with the connect timeout divided among its addresses."""
    timeouts: dict[str, float] = request.extensions["timeout"]
    return {**timeouts, "connect": timeouts["connect"] / address_count}


async def _resolve_host(host: str, port: int) -> list[str]:
    try:
        address_infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise httpx.ConnectError(f"the host {host} cannot be resolved") from error
    addresses = list(dict.fromkeys(str(info[4][0]) for info in address_infos))
    if any(is_forbidden(address) for address in addresses):
        raise ForbiddenAddress(f"{host} has an address that no service may have")
    return addresses


def _parse_address(host: str) -> IpAddress | None:
    """Parse a host that is an IP address, in all notations that resolvers accept (127.1, 0x7f000001)."""
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        pass
    try:
        return ipaddress.ip_address(socket.inet_aton(host))
    except (OSError, UnicodeError):
        return None
