"""Addresses that nothing here connects to, whoever names them. A home's private networks are fine; where clouds keep
secrets is not."""

import ipaddress

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

METADATA_ADDRESSES = {ipaddress.ip_address("fd00:ec2::254"), ipaddress.ip_address("100.100.100.200")}
"""Where clouds tell machines their secrets, beside the link-local addresses."""


def is_forbidden(address: str | IpAddress) -> bool:
    """An address as it is, or as text, with or without the name of an interface behind it."""
    ip = ipaddress.ip_address(address.partition("%")[0]) if isinstance(address, str) else address
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_link_local or ip.is_multicast or ip.is_unspecified or ip in METADATA_ADDRESSES
