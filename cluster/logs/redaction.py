"""Mask secrets in text that is logged or stored."""

import re
from collections.abc import Mapping
from typing import Any

MASK = "********"

_SENSITIVE_WORDS = r"password|passwd|secret|token(?!s|iz)|api[-_]?key|signing[-_]?key|authorization|cookie"
SECRET_NAME = re.compile(_SENSITIVE_WORDS, re.IGNORECASE)
"""Matches names of secret values, such as api_key."""
_SECRET_NAME_PATTERN = rf"\b[\w.-]{{0,40}}(?:{_SENSITIVE_WORDS})[\w.-]{{0,40}}"
_REDACTIONS = (
    # https://token@host and scheme://user:password@host
    (re.compile(r"(\bhttps?://)[^\s/@'\"]+@", re.IGNORECASE), rf"\1{MASK}@"),
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s:/@'\"]*):[^\s/'\"]+@", re.IGNORECASE), rf"\1:{MASK}@"),
    # name="value", {'name': 'value'}, (b'name', b'value'): between quotes a value may hold anything
    (re.compile(rf"({_SECRET_NAME_PATTERN}[\"']?\s*[:=,]\s*b?)([\"'])(?:(?!\2).)*\2", re.IGNORECASE), rf"\1\2{MASK}\2"),
    (re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{4,}", re.IGNORECASE), rf"\1 {MASK}"),
    # name: value, name=value
    (
        re.compile(
            rf"({_SECRET_NAME_PATTERN}[\"']?\s*[:=]\s*)(?!Bearer|Basic|b?[\"'])[^\s&,;\"'}})\]]+", re.IGNORECASE
        ),
        rf"\1{MASK}",
    ),
    # Forgearr's own credentials, and any JWT, without a name before them
    (re.compile(r"\b(fgr|refresh)_[\w-]{16,}"), rf"\1_{MASK}"),
    (re.compile(r"\beyJ[\w-]+\.[\w-]+\.[\w-]*"), MASK),
)
_URL = re.compile(r"(https?://)(?:[^\s/@]*@)?([^\s/?#&]+)[/?#&]\S*", re.IGNORECASE)


def redact(text: str) -> str:
    """Return the text with all secrets masked."""
    for pattern, replacement in _REDACTIONS:
        text = pattern.sub(replacement, text)
    return text


def redact_document(document: Any) -> Any:
    """Return a JSON document with secrets masked, in its texts and under names such as api_key."""
    if isinstance(document, str):
        return redact(document)
    if isinstance(document, list):
        return [redact_document(item) for item in document]
    if isinstance(document, Mapping):
        return {
            name: MASK if isinstance(value, str) and value and SECRET_NAME.search(name) else redact_document(value)
            for name, value in document.items()
        }
    return document


def strip_url_paths(text: str) -> str:
    """Return the text with each URL cut after its host, because any other part of a link may be a key."""
    return _URL.sub(r"\1\2/…", text)
