"""What is needed to call one service, and what a call returns."""

import re
import ssl
from dataclasses import dataclass, field
from functools import cache

import httpx

from cluster.services.http.profile import ServiceProfile

LARGE_BODY_BYTES = 256 * 1024
"""What is longer is parsed in another thread, so that it holds nobody else up."""


@dataclass(frozen=True)
class Connection:
    """Where a service is, and what it is asked with."""

    name: str
    profile: ServiceProfile
    url: str
    key: str | None = field(default=None, repr=False)
    verify_tls: bool = True


@dataclass(frozen=True)
class ServiceResponse:
    status: int
    content: bytes = field(repr=False)
    location: str | None = None

    @property
    def is_html(self) -> bool:
        # By what it is: SABnzbd calls its words of refusal a page, and others call their pages words.
        return self.content[:64].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<")

    @property
    def title(self) -> str | None:
        """What a web page calls itself."""
        match = re.search(rb"<title[^>]*>([^<]{1,200})</title>", self.content[:LARGE_BODY_BYTES], re.IGNORECASE)
        return " ".join(match[1].decode(errors="replace").split()) if match else None


@cache
def tls_context(verify: bool) -> ssl.SSLContext:
    return httpx.create_ssl_context(verify=verify, trust_env=False)
