"""Verify and parse the webhooks of GitHub, Gitea and GitLab. Pure functions."""

import hashlib
import hmac
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast
from urllib.parse import parse_qs, urlsplit

import orjson

Provider = Literal["github", "gitea", "gitlab"]

EVENT_HEADERS = {"github": "x-github-event", "gitea": "x-gitea-event", "gitlab": "x-gitlab-event"}
PUSHES = {"push", "push hook"}
PINGS = {"ping"}
SCP = re.compile(r"[^/\s]+@([^/:\s]+):(?!/)(.+)")
BRANCH = "refs/heads/"
MAX_FORM_FIELDS = 10
NULL_COMMIT = re.compile(r"0*")


def is_signed(provider: Provider, headers: Mapping[str, str], body: bytes, secret: str) -> bool:
    """Whether the sender of this body knows the secret. `headers` have lower-case names."""
    if provider == "gitlab":
        # GitLab sends the secret itself.
        return hmac.compare_digest(headers.get("x-gitlab-token", "").encode(), secret.encode())
    signature = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    if provider == "gitea":
        return hmac.compare_digest(headers.get("x-gitea-signature", "").encode(), signature.encode())
    return hmac.compare_digest(headers.get("x-hub-signature-256", "").encode(), f"sha256={signature}".encode())


def is_ping(provider: Provider, headers: Mapping[str, str]) -> bool:
    return headers.get(EVENT_HEADERS[provider], "").lower() in PINGS


def is_push(provider: Provider, headers: Mapping[str, str]) -> bool:
    return headers.get(EVENT_HEADERS[provider], "").lower() in PUSHES


def payload_document(headers: Mapping[str, str], body: bytes) -> bytes:
    """The JSON document in a body. GitHub may send it as a field of a form."""
    if not headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        return body
    try:
        fields = parse_qs(body, max_num_fields=MAX_FORM_FIELDS)
    except ValueError:
        return b""
    return next(iter(fields.get(b"payload", [])), b"")


def parse_payload(document: bytes) -> dict[str, Any]:
    """The payload of an event, or {} if it is not valid."""
    try:
        payload = orjson.loads(document)
    except orjson.JSONDecodeError:
        return {}
    return cast(dict[str, Any], payload) if isinstance(payload, dict) else {}


def repository_keys(payload: Mapping[str, Any]) -> set[str]:
    """The addresses of the repository in a payload, as `repository_key` writes them."""
    return {repository_key(address) for address in _addresses(payload) if address}


def repository_key(address: str) -> str:
    """Normalize an address to host/owner/name, which is the same for HTTP and SSH."""
    scp = SCP.fullmatch(address)
    if scp:
        host, path = scp.groups()
    else:
        try:
            parts = urlsplit(address)
            host, path = parts.hostname or "", parts.path
        except ValueError:
            return ""
    return f"{host}/{path.strip('/').removesuffix('.git')}".lower()


def pushed_branch(payload: Mapping[str, Any]) -> str | None:
    """The branch that was pushed; None for a tag, and for a deleted branch."""
    reference, after = payload.get("ref"), payload.get("after")
    deleted = payload.get("deleted") is True or (isinstance(after, str) and NULL_COMMIT.fullmatch(after))
    if deleted or not isinstance(reference, str) or not reference.startswith(BRANCH):
        return None
    return reference.removeprefix(BRANCH)


def default_branch(payload: Mapping[str, Any]) -> str | None:
    named = (part.get("default_branch") for part in _descriptions(payload))
    return next((name for name in named if isinstance(name, str)), None)


def _addresses(payload: Mapping[str, Any]) -> Iterator[str]:
    names = ("clone_url", "ssh_url", "git_url", "html_url", "git_http_url", "git_ssh_url", "web_url", "url")
    for part in _descriptions(payload):
        for name in names:
            if isinstance(address := part.get(name), str):
                yield address


def _descriptions(payload: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name in ("repository", "project"):
        if isinstance(part := payload.get(name), dict):
            yield cast(dict[str, Any], part)
