"""The data that a call to a service needs, and the response that it returns."""

import re
import ssl
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import httpx

from cluster.services.http.profile import ServiceProfile

LARGE_BODY_BYTES = 256 * 1024
"""Longer bodies are parsed in a thread, so that the event loop is not blocked."""

ERROR_FIELDS = ("errorMessage", "message", "error", "detail", "errors", "status")


@dataclass(frozen=True)
class Connection:
    """The address of a service, and how to call it."""

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
        # By content, because the Content-Type is wrong in both directions: SABnzbd sends plain error messages as HTML.
        return self.content[:64].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<")

    @property
    def title(self) -> str | None:
        """The title of a web page."""
        match = re.search(rb"<title[^>]*>([^<]{1,200})</title>", self.content[:LARGE_BODY_BYTES], re.IGNORECASE)
        return " ".join(match[1].decode(errors="replace").split()) if match else None


@cache
def tls_context(verify: bool) -> ssl.SSLContext:
    return httpx.create_ssl_context(verify=verify, trust_env=False)


def extract_message(body: Any) -> str:
    """Return the message in an error body, in any of the formats that services use."""
    if isinstance(body, list):
        return "; ".join(filter(None, map(extract_message, body[:5])))
    if isinstance(body, dict):
        return next((extract_message(body[name]) for name in ERROR_FIELDS if body.get(name)), "")
    return str(body) if isinstance(body, str) else ""
