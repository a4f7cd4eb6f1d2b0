"""Addresses that Forgearr never connects to, such as the metadata services of clouds.

Private networks are allowed: the services that Forgearr connects to are usually there.
"""

import ipaddress

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

METADATA_ADDRESSES = {ipaddress.ip_address("fd00:ec2::254"), ipaddress.ip_address("100.100.100.200")}
"""The metadata services of clouds that are not link-local. They give credentials to any program that asks."""


def is_forbidden(address: str | IpAddress) -> bool:
    """Whether connections to this address are refused. A text may end with an interface, such as %eth0."""
    ip = ipaddress.ip_address(address.partition("%")[0]) if isinstance(address, str) else address
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_link_local or ip.is_multicast or ip.is_unspecified or ip in METADATA_ADDRESSES
