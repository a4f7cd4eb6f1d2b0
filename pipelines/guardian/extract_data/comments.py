"""Clean docstrings and comments: remove comment marks, licences and directives, and drop uninformative text."""

import inspect
import re
from collections.abc import Sequence

LICENCE = re.compile(
    r"copyright (?:\(c\)|©|\d{4}|the\b)|SPDX-License-Identifier|all rights reserved|\(c\) \d{4}"
    r"|licensed under|licensed to the apache|redistribution and use in source|permission is hereby granted"
    r"|gnu (?:lesser |affero )?general public licen[sc]e|apache license,? version|mozilla public license"
    r"|this (?:source code|code|file) is (?:licensed|distributed|governed|made available)|without warrant(?:y|ies)",
    re.IGNORECASE,
)
"""Phrases that occur in licences only. A sentence about licences does not match."""

DIRECTIVE = re.compile(
    r"(?:noqa|nolint|nosec|type:|pylint:|pyright:|mypy:|ruff:|fmt:|isort:|pragma[: ]|eslint|tslint|ts-|@ts-|prettier-"
    r"|biome-|istanbul|c8 |go:|\+build|line |clang-format|NOLINT|region\b|endregion\b|\$\w+:|vim:|-\*-|#!|"
    r"(?:Copied|Adapted|Modified) from\b|<editor-fold|todo\b|fixme\b|xxx\b|hack\b)",
    re.IGNORECASE,
)
"""The beginning of a line that addresses a tool, or the next developer."""

LINE_MARK = re.compile(r"\s*(?:///?!?|#+)[ \t]?")
BLOCK_BEGIN, BLOCK_END = re.compile(r"\A\s*/\*+[!<]?[ \t]?"), re.compile(r"[ \t]*\*+/\s*\Z")
BLOCK_LINE = re.compile(r"^[ \t]*\*(?!\*)[ \t]?", re.MULTILINE)
SEPARATOR = re.compile(r"[\W_]*")

INLINE_TAG = re.compile(r"\{@(?:code|link|linkplain|literal|value)\s+([^{}]*)\}")
PARAGRAPH_TAG = re.compile(r"[ \t]*</?(?:p|br|ul|ol|div|pre|blockquote)\s*/?>[ \t]*", re.IGNORECASE)
ITEM_TAG = re.compile(r"[ \t]*<li>[ \t]*", re.IGNORECASE)
OTHER_TAG = re.compile(r"</?(?:li|i|b|em|strong|tt)>", re.IGNORECASE)
CODE_TAG = re.compile(r"</?code>", re.IGNORECASE)
BOOK_KEEPING = re.compile(
    r"^@(?:author|since|version|see|internal|private|public|protected|override|hidden|inheritDoc|file|module|class"
    r"|constructor|function|memberof|export|extends|implements|static|async|readonly|type|typedef|ignore)\b.*$"
    r"|\{@inheritDoc\}",
    re.IGNORECASE | re.MULTILINE,
)

PARAMETERS = re.compile(
    r"(?:args|arguments|parameters|params|returns?|raises|yields|attributes|examples?|usage|notes?|kwargs|see also)"
    r"\s*:?\s*(?:\n|\Z)"
    r"|@(?:param|return|throws|see|deprecated)\b|:(?:param|type|return|rtype|raises)\b|[\w*]+ \(.*\)\s*:|>>> ",
    re.IGNORECASE,
)
"""The beginning of a text that only lists parameters or shows a call, and does not explain a purpose."""

MIN_CHARACTERS, MIN_WORDS = 12, 3


def clean_docstring(text: str) -> str:
    """The text of a docstring, or "" if it is not informative."""
    return _if_informative(inspect.cleandoc(text))


def clean_comment(parts: Sequence[str]) -> str:
    """The text of the adjacent comments above a declaration, or "" if it is not informative."""
    lines: list[str] = []
    for part in (raw.rstrip("\n") for raw in parts):
        lines += (_clean_block(part) if part.lstrip().startswith("/*") else LINE_MARK.sub("", part, count=1)).split(
            "\n"
        )
    text = "\n".join(line.rstrip() for line in lines if not DIRECTIVE.match(line.strip()))
    return _if_informative(
        inspect.cleandoc("\n".join("" if _is_separator(line) else line for line in text.split("\n")))
    )


def is_licence(text: str) -> bool:
    return LICENCE.search(text) is not None


def shorten(text: str, limit: int) -> str:
    """The first whole paragraphs of a text, up to `limit` characters; "" if the first one is longer."""
    if len(text) <= limit:
        return text
    end = text.rfind("\n\n", 0, limit + 2)
    return text[:end].rstrip() if end > 0 else ""


def _clean_block(text: str) -> str:
    inside = BLOCK_END.sub("", BLOCK_BEGIN.sub("", text))
    inside = BLOCK_LINE.sub("", inside)
    inside = BOOK_KEEPING.sub("", INLINE_TAG.sub(_quoted, inside))
    inside = ITEM_TAG.sub("- ", PARAGRAPH_TAG.sub("\n", inside))
    return CODE_TAG.sub("`", OTHER_TAG.sub("", inside))


def _quoted(tag: re.Match[str]) -> str:
    return f"`{tag[1].strip().lstrip('#')}`"


def _if_informative(text: str) -> str:
    paragraphs = [part.rstrip().strip("\n") for part in re.split(r"\n[ \t]*\n", text)]
    cleaned = "\n\n".join(part for part in paragraphs if part.strip() and not is_licence(part)).strip()
    words = re.findall(r"[^\W\d_]{2,}", cleaned)
    is_long_enough = len(cleaned) >= MIN_CHARACTERS and len(words) >= MIN_WORDS
    return cleaned if is_long_enough and not PARAMETERS.match(cleaned) else ""


def _is_separator(line: str) -> bool:
    """Whether a line is a separator, such as a line of dashes."""
    return len(line.strip()) > 2 and SEPARATOR.fullmatch(line) is not None
