"""Addresses that Forgearr never connects to, such as the metadata services of clouds.

Private networks are allowed: the services that Forgearr connects to are usually there.
"""

import ipaddress
from collections.abc import Iterator

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

METADATA_ADDRESSES = {
    ipaddress.ip_address(text)
    for text in ("fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "168.63.129.16", "192.0.0.192")
}
"""The metadata services of clouds that are not link-local. They give credentials to any program that asks."""
NAT64_NETWORKS = [ipaddress.ip_network(text) for text in ("64:ff9b::/96", "64:ff9b:1::/48")]
IPV4_COMPATIBLE = ipaddress.ip_network("::/96")


def is_forbidden(address: str | IpAddress) -> bool:
    """Whether connections to this address are refused. A text may end with an interface, such as %eth0."""
    ip = ipaddress.ip_address(address.partition("%")[0]) if isinstance(address, str) else address
    return any(
        known.is_link_local or known.is_multicast or known.is_unspecified or known in METADATA_ADDRESSES
        for known in (ip, *_embedded_addresses(ip))
    )


def _embedded_addresses(ip: IpAddress) -> Iterator[IpAddress]:
    """Yield the IPv4 addresses to which routers and kernels may translate an IPv6 address."""
    if isinstance(ip, ipaddress.IPv4Address):
        return
    yield from (embedded for embedded in (ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())) if embedded)
    # 0.0.0.0 is no translation: it is in :: itself, and in the addresses of networks.
    last = int(ip) & 0xFFFF_FFFF
    if last and (ip in IPV4_COMPATIBLE or any(ip in network for network in NAT64_NETWORKS)):
        yield ipaddress.IPv4Address(last)
