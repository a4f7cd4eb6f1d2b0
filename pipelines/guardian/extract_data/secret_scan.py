"""Find secrets in texts with the detectors of detect-secrets, so that they are not trained on.

The detectors are called directly, and only on lines that may match. The scan of detect-secrets itself takes fifty times
as long, reads files only, and skips every line that looks like a call. No secret is verified online.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
from detect_secrets.filters import allowlist, heuristic
from detect_secrets.plugins import keyword
from detect_secrets.plugins.base import RegexBasedDetector
from detect_secrets.plugins.cloudant import CloudantDetector
from detect_secrets.plugins.high_entropy_strings import HighEntropyStringsPlugin
from detect_secrets.plugins.ibm_cloud_iam import IbmCloudIamDetector
from detect_secrets.plugins.ibm_cos_hmac import IbmCosHmacDetector
from detect_secrets.plugins.ip_public import IPPublicDetector
from detect_secrets.plugins.private_key import PrivateKeyDetector
from detect_secrets.plugins.softlayer import SoftlayerDetector
from detect_secrets.util.code_snippet import CodeSnippet
from detect_secrets.util.filetype import FileType, determine_file_type

IGNORED_DETECTORS = (IPPublicDetector,)
"""IP addresses are not secrets, and version numbers look like them."""

KEYWORDS = re.compile("|".join(keyword.DENYLIST))
"""For lower-case text."""
ASSIGNMENT = re.compile(r"\s*(?:[-*>$#]\s+)?(?:export\s+|set\s+|ENV\s+)?[\"']?[\w.-]+[\"']?\s*[:=]\s*\S+\s*")
"""A line of text that assigns a value. As in configuration files, the value needs no quotes."""
MAX_LINE_CHARACTERS, OVERLAP = 2000, 200
MIN_RANDOM_LENGTH = 9
"""A shorter string cannot reach the entropy limit of the detectors."""

LONG_VALUE_DETECTORS = (CloudantDetector, IbmCloudIamDetector, IbmCosHmacDetector, SoftlayerDetector)
LONG_VALUE = re.compile(r"[a-zA-Z0-9_-]{24,}")
"""Detectors with slow patterns, and a fast pattern that occurs in every line that they match."""

RUN = re.compile(r"[^\s\"'`<>()]+")
"""Some detectors match only the beginning of a secret. The whole run of characters is the secret."""

KEY_END = re.compile(r"END [A-Z0-9 ]*PRIVATE KEY")
MAX_KEY_LINES = 200
"""The maximum length of a private key whose end is not marked."""


@dataclass(frozen=True)
class Leak:
    line: int  # from 1
    kind: str
    value: str = field(repr=False)


def find(path: str, text: str) -> list[Leak]:
    """The secrets in a text, in the order of its lines. The path determines the type of the file."""
    lines = text.split("\n")
    found = {(leak.line, leak.kind, leak.value): leak for leak in _find(path, text, lines)}
    return sorted(found.values(), key=lambda leak: (leak.line, leak.kind))


def _find(path: str, text: str, lines: Sequence[str]) -> Iterator[Leak]:
    with_long_values = "\n".join(lines[number] for number in _lines_with(LONG_VALUE, text))
    for detector, patterns in _detectors():
        if isinstance(detector, keyword.KeywordDetector):
            candidates = _keyword_secrets(detector, path, text, lines)
        elif isinstance(detector, HighEntropyStringsPlugin):
            candidates = _random_strings(detector, patterns[0], text)
        elif _matches_any(patterns, with_long_values if isinstance(detector, LONG_VALUE_DETECTORS) else text):
            candidates = (
                (number, value) for number, line in enumerate(lines) for value in detector.analyze_string(line)
            )
        else:
            continue
        for number, value in candidates:
            if not _is_harmless(path, lines, number, value, detector):
                yield from _leaks(lines, number, value, detector)


def _matches_any(patterns: Sequence[re.Pattern[str]], text: str) -> bool:
    return any(pattern.search(text) for pattern in patterns)


def _leaks(lines: Sequence[str], number: int, value: str, detector: Any) -> Iterator[Leak]:
    run = next((candidate for candidate in RUN.findall(lines[number]) if value in candidate), value)
    yield Leak(number + 1, detector.secret_type, run)
    if not isinstance(detector, PrivateKeyDetector):
        return
    for following in range(number + 1, min(number + MAX_KEY_LINES, len(lines))):
        if KEY_END.search(lines[following]):
            return
        if inside := lines[following].strip(" \t\"'+\\n,"):
            yield Leak(following + 1, detector.secret_type, inside)


def _keyword_secrets(detector: Any, path: str, text: str, lines: Sequence[str]) -> Iterator[tuple[int, str]]:
    kind = determine_file_type(path)
    patterns = keyword.REGEX_BY_FILETYPE.get(kind, keyword.QUOTES_REQUIRED_DENYLIST_REGEX_TO_GROUP)
    for number in _lines_with(KEYWORDS, text.lower()):
        line = lines[number]
        loose = kind == FileType.OTHER and len(line) <= MAX_LINE_CHARACTERS and ASSIGNMENT.fullmatch(line)
        of_line = keyword.CONFIG_DENYLIST_REGEX_TO_GROUP if loose else patterns
        for start in range(0, len(line), MAX_LINE_CHARACTERS - OVERLAP):
            part = line[start : start + MAX_LINE_CHARACTERS]
            yield from ((number, value) for value in detector.analyze_string(part, of_line) if value)


def _random_strings(detector: Any, pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, str]]:
    for match in pattern.finditer(text):
        if detector.calculate_shannon_entropy(match[2]) > detector.entropy_limit:
            yield text.count("\n", 0, match.start()), match[2]


def _is_harmless(path: str, lines: Sequence[str], number: int, value: str, detector: Any) -> bool:
    """Whether a filter of detect-secrets, or a mark in the line, says that this is not a secret."""
    line = lines[number]
    snippet = CodeSnippet([lines[number - 1], line] if number else [line], 0, 1 if number else 0)
    is_pattern = isinstance(detector, RegexBasedDetector)
    return (
        allowlist.is_line_allowlisted(path, line, snippet)
        or (
            not is_pattern
            and (
                heuristic.is_sequential_string(value)
                or heuristic.is_potential_uuid(value)
                or heuristic.is_likely_id_string(value, line, detector)
                or heuristic.is_not_alphanumeric_string(value)
                or heuristic.is_prefixed_with_dollar_sign(value)
            )
        )
        or heuristic.is_templated_secret(value)
        or (isinstance(detector, keyword.KeywordDetector) and heuristic.is_indirect_reference(line))
    )


def _lines_with(pattern: re.Pattern[str], text: str) -> Iterator[int]:
    number = start = 0
    last = -1
    for match in pattern.finditer(text):
        number += text.count("\n", start, match.start())
        start = match.start()
        if number != last:
            yield number
        last = number


@cache
def _detectors() -> list[tuple[Any, list[re.Pattern[str]]]]:
    """Each detector, with its patterns: a text that matches none of them need not be searched line by line."""
    kinds: Mapping[str, Any] = get_mapping_from_secret_type_to_class()
    return [
        (detector, _patterns(detector))
        for detector in (kind() for _, kind in sorted(kinds.items()) if kind not in IGNORED_DETECTORS)
    ]


def _patterns(detector: Any) -> list[re.Pattern[str]]:
    if isinstance(detector, HighEntropyStringsPlugin):
        return [re.compile(rf"(['\"])([{re.escape(detector.charset)}]{{{MIN_RANDOM_LENGTH},}})(\1)")]
    if isinstance(detector, RegexBasedDetector):
        return [re.compile(pattern.pattern, pattern.flags | re.MULTILINE) for pattern in detector.denylist]
    return []
