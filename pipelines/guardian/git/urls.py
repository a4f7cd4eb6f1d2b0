"""Which addresses a repository may be fetched from."""

import re
import socket
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from cluster.errors import InvalidRequest, Unavailable
from cluster.ssrf import is_forbidden

SCHEMES = {"https": 443, "http": 80, "ssh": 22}


class InvalidAddress(InvalidRequest):
    """Nothing is fetched from such an address."""

    code = "INVALID_REPOSITORY_URL"


class UnknownHost(Unavailable):
    """There is no machine of this name."""

    code = "UNKNOWN_HOST"


@dataclass(frozen=True)
class RemoteRepository:
    url: str
    branch: str | None
    username: str | None = None
    token: str | None = field(default=None, repr=False)


def validate_url(url: str) -> str:
    """The address, if it is of a sort that is fetched from."""
    if re.search(r"[\s\x00-\x1f\x7f]", url):
        raise InvalidAddress("The address of a repository has no spaces in it.")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise InvalidAddress("The address of the repository cannot be read.") from None
    if parts.scheme not in SCHEMES or not host or host.startswith("-") or port == 0:
        raise InvalidAddress("A repository is fetched from an address with https://, http:// or ssh://.")
    if parts.password is not None or (parts.username is not None and parts.scheme != "ssh"):
        raise InvalidAddress("Credentials do not belong into the address: send them as credentials.")
    if (parts.username or "").startswith("-") or parts.path in {"", "/"}:
        raise InvalidAddress("The address names no repository.")
    if parts.query or parts.fragment:
        raise InvalidAddress("The address of a repository has no ? and no # in it.")
    return url


def resolve_address(host: str, port: int) -> str:
    """The address of a machine, if it is one that may be asked."""
    try:
        addresses = {str(known[4][0]) for known in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise UnknownHost(f"There is no machine named {host} ({error}).") from None
    if any(is_forbidden(address) for address in addresses):
        raise InvalidAddress(f"{host} is an address that nothing is fetched from.")
    ipv4 = sorted(address for address in addresses if ":" not in address)
    return ipv4[0] if ipv4 else f"[{min(addresses)}]"
