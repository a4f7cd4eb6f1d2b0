"""A folder of documents as samples: what it says in its files is what the model learns to say, and nothing else.

Each section of a Markdown file answers what that file says about the section's heading, and each text file what it
says. Files of samples (.jsonl) are taken as they are. A git repository is a folder like any other. Hidden files, links,
other people's packages and files of other kinds are not documents.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import InvalidRequest
from pipelines.training.data.messages import Message
from pipelines.training.data.parsing import read
from pipelines.training.data.samples import Pair, Sample

MARKDOWN = {".md", ".markdown"}
TEXT = {".txt", ".text", ".rst"}
SAMPLES = {".jsonl"}
FOREIGN = {"node_modules", "site-packages", "__pycache__"}

MAX_FILES = 20_000
MAX_BYTES = 256 * 1024 * 1024
PIECE_CHARACTERS = 2000
"""What one answer has of a long text: paragraphs together up to this, so that it fits the context of small models."""

HEADING = re.compile(r"(#{1,6})\s+(.*?)(?:\s+#+)?\s*")
FENCE = re.compile(r"\s{0,3}(`{3,}|~{3,})(.*)")
FRONT_MATTER = re.compile(r"\A---\n.*?\n(---|\.\.\.)(\n|\Z)", re.DOTALL)


class TooManyDocuments(InvalidRequest):
    """The folder holds more documents than can be learned at once."""

    code = "TOO_MANY_DOCUMENTS"


class NoDocument(InvalidRequest):
    """There is nothing to learn from in the folder."""

    code = "NO_DOCUMENT"


class UnreadableDocument(InvalidRequest):
    """A document cannot be read."""

    code = "UNREADABLE_DOCUMENT"


@dataclass
class Reading:
    """What a folder gave."""

    samples: list[Sample] | list[Pair] = field(default_factory=list[Sample])
    files: int = 0
    skipped: list[str] = field(default_factory=list[str])  # named like documents, but not text in UTF-8


def read_folder(folder: Path) -> Reading:
    """Everything there is to learn in a folder, in the order of its paths."""
    reading = Reading()
    samples: list[Sample | Pair] = []
    size = 0
    for path in _documents(folder):
        name = shown(path.relative_to(folder))
        size += path.stat().st_size
        if reading.files == MAX_FILES or size > MAX_BYTES:
            raise TooManyDocuments(
                f"{folder} holds more than {MAX_FILES} documents or {MAX_BYTES // 1024 // 1024} MiB: name a part of it."
            )
        text = _text(path)
        if text is None:
            reading.skipped.append(name)
            continue
        reading.files += 1
        samples += read(text.split("\n"), name) if path.suffix.lower() in SAMPLES else _learned(path, name, text)
    if not samples:
        kinds = ", ".join(sorted(MARKDOWN | TEXT | SAMPLES))
        raise NoDocument(f"{folder} has no document with text in it ({kinds}).")
    sorts = {type(sample) for sample in samples}
    if len(sorts) > 1:
        raise InvalidRequest(f"{folder} has both preferences and other documents: name a folder with one sort of them.")
    reading.samples = samples  # pyright: ignore[reportAttributeAccessIssue]
    return reading


def sections(text: str) -> Iterator[tuple[list[str], str]]:
    """The sections of a Markdown text: the headings above each of them, outermost first, and what it says."""
    headings: list[tuple[int, str]] = []
    lines: list[str] = []
    fence = ""
    for line in FRONT_MATTER.sub("", text).split("\n"):
        fence = fence_after(line, fence)
        heading = None if fence else HEADING.fullmatch(line)
        if heading is None:
            lines.append(line)
            continue
        yield [title for _, title in headings], "\n".join(lines).strip()
        lines = []
        level = len(heading[1])
        headings = [*((outer, title) for outer, title in headings if outer < level), (level, heading[2])]
    yield [title for _, title in headings], "\n".join(lines).strip()


def pieces(text: str) -> list[str]:
    """A text in pieces of whole paragraphs; a paragraph is cut only where it is too long by itself."""
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        for start in range(0, len(paragraph), PIECE_CHARACTERS):
            part = paragraph[start : start + PIECE_CHARACTERS]
            if found and not start and len(found[-1]) + len(part) + 2 <= PIECE_CHARACTERS:
                found[-1] += f"\n\n{part}"
            else:
                found.append(part)
    return [piece for piece in found if piece.strip()]


def fence_after(line: str, fence: str) -> str:
    """The fence of the code that the next line is in, empty outside of code."""
    mark = FENCE.fullmatch(line)
    if mark is None:
        return fence
    if not fence:
        return mark[1]
    return "" if mark[1].startswith(fence) and not mark[2].strip() else fence


def shown(path: Path) -> str:
    """A path as text that can be kept, also where its name is no UTF-8."""
    return os.fsencode(path.as_posix()).decode(errors="replace")


def _documents(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in FOREIGN)
        for name in sorted(names):
            path = Path(place, name)
            known = path.suffix.lower() in MARKDOWN | TEXT | SAMPLES
            # A link could lead out of the folder, and what is no regular file may never end.
            if known and not name.startswith(".") and not path.is_symlink() and path.is_file():
                yield path


def _refuse(error: OSError) -> None:
    raise UnreadableDocument(f"{error.filename} cannot be read: {error.strerror}.") from error


def _text(path: Path) -> str | None:
    """None if it is no text."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        return _refuse(error)
    return None if "\0" in text else text.replace("\r\n", "\n")


def _learned(path: Path, name: str, text: str) -> Iterator[Sample]:
    told = sections(text) if path.suffix.lower() in MARKDOWN else [(list[str](), text)]
    for headings, said in told:
        answers = pieces(said)
        for number, answer in enumerate(answers, 1):
            yield _sample(_question(name, headings, number, len(answers)), answer)


def _question(name: str, headings: Sequence[str], number: int, count: int) -> str:
    about = f" about {' / '.join(headings)}" if headings else ""
    part = f" (part {number} of {count})" if count > 1 else ""
    return f"What does {name} say{about}?{part}"


def _sample(question: str, answer: str) -> Sample:
    return Sample(messages=[Message(role="user", content=question), Message(role="assistant", content=answer)])
