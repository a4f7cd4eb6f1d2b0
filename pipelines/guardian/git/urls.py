"""Check the URL of a remote repository, and resolve its host to an address that may be fetched from."""

import re
import socket
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from cluster.errors import InvalidRequest, Unavailable
from cluster.ssrf import is_forbidden

SCHEMES = {"https": 443, "http": 80, "ssh": 22}


class InvalidAddress(InvalidRequest):
    """Repositories cannot be fetched from this address."""

    code = "INVALID_REPOSITORY_URL"


class UnknownHost(Unavailable):
    """There is no host of this name."""

    code = "UNKNOWN_HOST"


@dataclass(frozen=True)
class RemoteRepository:
    url: str
    branch: str | None
    username: str | None = None
    token: str | None = field(default=None, repr=False)


def validate_url(url: str) -> str:
    """Return the URL, if its form is allowed. Raises InvalidAddress."""
    if re.search(r"[\s\x00-\x1f\x7f]", url):
        raise InvalidAddress("The address of a repository must not contain spaces.")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise InvalidAddress("The address of the repository is not a valid URL.") from None
    if parts.scheme not in SCHEMES or not host or host.startswith("-") or port == 0:
        raise InvalidAddress("The address of a repository must begin with https://, http:// or ssh://.")
    if parts.password is not None or (parts.username is not None and parts.scheme != "ssh"):
        raise InvalidAddress("The address must not contain credentials: send them as credentials.")
    if (parts.username or "").startswith("-") or parts.path in {"", "/"}:
        raise InvalidAddress("The address has no path to a repository.")
    if parts.query or parts.fragment:
        raise InvalidAddress("The address of a repository must not contain ? or #.")
    return url


def resolve_address(host: str, port: int) -> str:
    """Resolve a host to one of its IP addresses. Raises InvalidAddress if one of them is forbidden."""
    try:
        addresses = {str(known[4][0]) for known in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise UnknownHost(f"There is no host named {host} ({error}).") from None
    if any(is_forbidden(address) for address in addresses):
        raise InvalidAddress(f"Repositories cannot be fetched from {host}: its address is not allowed.")
    ipv4 = sorted(address for address in addresses if ":" not in address)
    return ipv4[0] if ipv4 else f"[{min(addresses)}]"
