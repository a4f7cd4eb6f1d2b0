"""One file or one change of a repository as questions and answers. Pure functions, for any process."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pipelines.guardian.extract_data import file_filter, questions, secret_scan, symbols
from pipelines.guardian.extract_data.comments import is_licence
from pipelines.guardian.extract_data.languages import language_of
from pipelines.guardian.extract_data.questions import Example
from pipelines.guardian.extract_data.secret_scan import Leak

SHORT_VALUE = 6
"""A secret shorter than this says little by itself: it counts only in the lines where it was found."""

SECTION = re.compile(r"^(?=diff --git )", re.MULTILINE)
PATHS = re.compile(r"^(?:\+\+\+|---) \"?[ab]/(.*?)\"?\t?$", re.MULTILINE)
HEADER_PATH = re.compile(r"diff --git \"?a/(.*?)\"? \"?b/.*")
ADDED_COMMENT = re.compile(r"(?<=\n)(?:\+[ \t]*(?:#|//|/?\*|<!--|--|;)[^\n]*\n(?:\+[ \t]*\n)?)+")


@dataclass(frozen=True)
class Extract:
    """What came of a file, or why nothing did."""

    examples: list[Example] = field(default_factory=list[Example])
    reason: str | None = None
    language: str = ""
    leaks: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])  # lines and kinds, never values
    withheld: int = 0  # examples with a secret in them
    paths: list[str] = field(default_factory=list[str])  # that a change is about


def of_file(path: str, content: bytes, limit: int) -> Extract:
    text, reason = file_filter.text_of(content)
    reason = reason or file_filter.skipped_by_text(path, text)
    if reason is not None:
        return Extract(reason=reason)
    language = language_of(path)
    if language is None:
        told = list(questions.of_document(path, text, limit))
    else:
        told = list(questions.of_source(path, symbols.find(text, language), language, limit))
    found = secret_scan.find(path, text)
    return _without_leaks(told, found, language.name if language else "Markdown")


def of_commit(subject: str, body: str, diff: str | None, limit: int) -> Extract:
    if diff is None:
        return Extract(reason="commit_too_large")
    sections = [one for one in SECTION.split(diff) if one]
    paths = sorted({path for one in sections for path in _paths(one)})
    kept = [(path, one) for one in sections for path in _paths(one)[:1] if _is_told(path, one)]
    example = questions.of_commit(subject, body, [_without_licence(one) for _, one in kept], limit) if kept else None
    if example is None:
        return Extract(reason="commit_says_little", paths=paths)
    found = [leak for path, one in kept for leak in secret_scan.find(path, _unmarked(one))]
    found += secret_scan.find("message", f"{subject}\n{body}")
    extract = _without_leaks([example], found, "")
    return Extract(extract.examples, None, "", extract.leaks, extract.withheld, paths)


def _without_leaks(told: Sequence[Example], found: Sequence[Leak], language: str) -> Extract:
    """Only the examples in which there is no secret, neither where it was found nor anywhere else in the file."""
    kept = [one for one in told if not any(_is_in(leak, one) for leak in found)]
    places = sorted({(leak.line, leak.kind) for leak in found})
    return Extract(kept, None, language, places, len(told) - len(kept))


def _is_in(leak: Leak, example: Example) -> bool:
    if len(leak.value) < SHORT_VALUE and not example.first <= leak.line <= example.last:
        return False
    return leak.value in example.answer or leak.value in example.question


def _paths(section: str) -> list[str]:
    head = section.partition("\n@@")[0]
    header = HEADER_PATH.match(head)
    return sorted({*PATHS.findall(head), *([header[1]] if header else [])})


def _is_told(path: str, section: str) -> bool:
    """Whether a part of a change is one that a person has made, in text."""
    reason = file_filter.skipped_by_path(path)
    return reason in {None, "other_kind"} and "\n@@" in section and "GIT binary patch" not in section


def _without_licence(section: str) -> str:
    """A new file's licence says nothing of the change."""
    head, mark, hunks = section.partition("\n@@ -0,0 ")
    if not mark:
        return section
    return head + mark + ADDED_COMMENT.sub(lambda block: "" if is_licence(block[0]) else block[0], hunks, count=1)


def _unmarked(section: str) -> str:
    return "\n".join(_lines(section))


def _lines(section: str) -> Iterator[str]:
    for line in section.split("\n"):
        yield line[1:] if line[:1] in {"+", "-", " "} else line
