"""Turn one file or one commit of a repository into examples. Pure functions, which run in any process."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pipelines.guardian.extract_data import file_filter, questions, secret_scan, symbols
from pipelines.guardian.extract_data.comments import is_licence
from pipelines.guardian.extract_data.languages import language_of
from pipelines.guardian.extract_data.questions import Example
from pipelines.guardian.extract_data.secret_scan import Leak

MIN_GLOBAL_SECRET_LENGTH = 6
"""A shorter secret may occur elsewhere by chance, so only the lines where it was found are withheld."""

SECTION = re.compile(r"^(?=diff --git )", re.MULTILINE)
PATHS = re.compile(r"^(?:\+\+\+|---) \"?[ab]/(.*?)\"?\t?$", re.MULTILINE)
HEADER_PATH = re.compile(r"diff --git \"?a/(.*?)\"? \"?b/.*")
ADDED_COMMENT = re.compile(r"(?<=\n)(?:\+[ \t]*(?:#|//|/?\*|<!--|--|;)[^\n]*\n(?:\+[ \t]*\n)?)+")


@dataclass(frozen=True)
class Extract:
    """The examples of a file or a commit, or the reason why it was skipped."""

    examples: list[Example] = field(default_factory=list[Example])
    reason: str | None = None
    language: str = ""
    leaks: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])  # lines and kinds, never values
    withheld: int = 0  # examples that contain a secret
    paths: list[str] = field(default_factory=list[str])  # that a commit changes


def extract_file(path: str, content: bytes, limit: int) -> Extract:
    text, reason = file_filter.decode_text(content)
    reason = reason or file_filter.skip_reason_by_text(path, text)
    if reason is not None:
        return Extract(reason=reason)
    language = language_of(path)
    if language is None:
        examples = list(questions.of_document(path, text, limit))
    else:
        examples = list(questions.of_source(path, symbols.find(text, language), language, limit))
    found_leaks = secret_scan.find(path, text)
    return _without_leaks(examples, found_leaks, language.name if language else "Markdown")


def extract_commit(subject: str, body: str, diff: str | None, limit: int) -> Extract:
    if diff is None:
        return Extract(reason="commit_too_large")
    sections = [section for section in SECTION.split(diff) if section]
    paths = sorted({path for section in sections for path in _paths(section)})
    relevant = [(path, section) for section in sections for path in _paths(section)[:1] if _is_relevant(path, section)]
    example = (
        questions.of_commit(subject, body, [_without_licence(section) for _, section in relevant], limit)
        if relevant
        else None
    )
    if example is None:
        return Extract(reason="commit_says_little", paths=paths)
    found_leaks = [leak for path, section in relevant for leak in secret_scan.find(path, _without_diff_marks(section))]
    found_leaks += secret_scan.find("message", f"{subject}\n{body}")
    extract = _without_leaks([example], found_leaks, "")
    return Extract(extract.examples, None, "", extract.leaks, extract.withheld, paths)


def _without_leaks(examples: Sequence[Example], found_leaks: Sequence[Leak], language: str) -> Extract:
    """Withhold the examples that contain a secret, also at another place than where it was found."""
    clean = [example for example in examples if not any(_exposes(leak, example) for leak in found_leaks)]
    locations = sorted({(leak.line, leak.kind) for leak in found_leaks})
    return Extract(clean, None, language, locations, len(examples) - len(clean))


def _exposes(leak: Leak, example: Example) -> bool:
    if len(leak.value) < MIN_GLOBAL_SECRET_LENGTH and not example.first <= leak.line <= example.last:
        return False
    return leak.value in example.answer or leak.value in example.question


def _paths(section: str) -> list[str]:
    head = section.partition("\n@@")[0]
    header = HEADER_PATH.match(head)
    return sorted({*PATHS.findall(head), *([header[1]] if header else [])})


def _is_relevant(path: str, section: str) -> bool:
    """Whether a section of a diff is a change of text, and not of generated or third-party files."""
    reason = file_filter.skip_reason_by_path(path)
    return reason in {None, "other_kind"} and "\n@@" in section and "GIT binary patch" not in section


def _without_licence(section: str) -> str:
    """Remove the licence of a new file, which does not describe the change."""
    head, mark, hunks = section.partition("\n@@ -0,0 ")
    if not mark:
        return section
    return head + mark + ADDED_COMMENT.sub(lambda block: "" if is_licence(block[0]) else block[0], hunks, count=1)


def _without_diff_marks(section: str) -> str:
    return "\n".join(_lines(section))


def _lines(section: str) -> Iterator[str]:
    for line in section.split("\n"):
        yield line[1:] if line[:1] in {"+", "-", " "} else line
