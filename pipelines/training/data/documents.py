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
from pipelines.training.data.parsing import read_samples
from pipelines.training.data.samples import PreferencePair, Sample

MARKDOWN_EXTENSIONS = {".md", ".markdown"}
TEXT_EXTENSIONS = {".txt", ".text", ".rst"}
SAMPLE_EXTENSIONS = {".jsonl"}
IGNORED_FOLDERS = {"node_modules", "site-packages", "__pycache__"}

MAX_FILES = 20_000
MAX_BYTES = 256 * 1024 * 1024
CHUNK_CHARACTERS = 2000
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
class FolderContent:
    """What a folder gave."""

    samples: list[Sample] | list[PreferencePair] = field(default_factory=list[Sample])
    files: int = 0
    skipped: list[str] = field(default_factory=list[str])  # named like documents, but not text in UTF-8


def read_folder(folder: Path) -> FolderContent:
    """Everything there is to learn in a folder, in the order of its paths."""
    content = FolderContent()
    samples: list[Sample | PreferencePair] = []
    size = 0
    for path in _documents(folder):
        name = printable_path(path.relative_to(folder))
        size += path.stat().st_size
        if content.files == MAX_FILES or size > MAX_BYTES:
            raise TooManyDocuments(
                f"{folder} holds more than {MAX_FILES} documents or {MAX_BYTES // 1024 // 1024} MiB: name a part of it."
            )
        text = _read_text(path)
        if text is None:
            content.skipped.append(name)
            continue
        content.files += 1
        samples += (
            read_samples(text.split("\n"), name)
            if path.suffix.lower() in SAMPLE_EXTENSIONS
            else _to_samples(path, name, text)
        )
    if not samples:
        kinds = ", ".join(sorted(MARKDOWN_EXTENSIONS | TEXT_EXTENSIONS | SAMPLE_EXTENSIONS))
        raise NoDocument(f"{folder} has no document with text in it ({kinds}).")
    sample_types = {type(sample) for sample in samples}
    if len(sample_types) > 1:
        raise InvalidRequest(f"{folder} has both preferences and other documents: name a folder with one sort of them.")
    content.samples = samples  # pyright: ignore[reportAttributeAccessIssue]
    return content


def sections(text: str) -> Iterator[tuple[list[str], str]]:
    """The sections of a Markdown text: the headings above each of them, outermost first, and what it says."""
    headings: list[tuple[int, str]] = []
    lines: list[str] = []
    fence = ""
    for line in FRONT_MATTER.sub("", text).split("\n"):
        fence = next_fence(line, fence)
        heading = None if fence else HEADING.fullmatch(line)
        if heading is None:
            lines.append(line)
            continue
        yield [title for _, title in headings], "\n".join(lines).strip()
        lines = []
        level = len(heading[1])
        headings = [*((outer, title) for outer, title in headings if outer < level), (level, heading[2])]
    yield [title for _, title in headings], "\n".join(lines).strip()


def split_into_chunks(text: str) -> list[str]:
    """A text in pieces of whole paragraphs; a paragraph is cut only where it is too long by itself."""
    chunks: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        for start in range(0, len(paragraph), CHUNK_CHARACTERS):
            part = paragraph[start : start + CHUNK_CHARACTERS]
            if chunks and not start and len(chunks[-1]) + len(part) + 2 <= CHUNK_CHARACTERS:
                chunks[-1] += f"\n\n{part}"
            else:
                chunks.append(part)
    return [chunk for chunk in chunks if chunk.strip()]


def next_fence(line: str, fence: str) -> str:
    """The fence of the code that the next line is in, empty outside of code."""
    match = FENCE.fullmatch(line)
    if match is None:
        return fence
    if not fence:
        return match[1]
    return "" if match[1].startswith(fence) and not match[2].strip() else fence


def printable_path(path: Path) -> str:
    """A path as text that can be kept, also where its name is no UTF-8."""
    return os.fsencode(path.as_posix()).decode(errors="replace")


def _documents(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder, onerror=_raise_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in IGNORED_FOLDERS)
        for name in sorted(names):
            path = Path(parent, name)
            is_document = path.suffix.lower() in MARKDOWN_EXTENSIONS | TEXT_EXTENSIONS | SAMPLE_EXTENSIONS
            # A link could lead out of the folder, and what is no regular file may never end.
            if is_document and not name.startswith(".") and not path.is_symlink() and path.is_file():
                yield path


def _raise_unreadable(error: OSError) -> None:
    raise UnreadableDocument(f"{error.filename} cannot be read: {error.strerror}.") from error


def _read_text(path: Path) -> str | None:
    """None if it is no text."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        return _raise_unreadable(error)
    return None if "\0" in text else text.replace("\r\n", "\n")


def _to_samples(path: Path, name: str, text: str) -> Iterator[Sample]:
    texts = sections(text) if path.suffix.lower() in MARKDOWN_EXTENSIONS else [(list[str](), text)]
    for headings, content in texts:
        answers = split_into_chunks(content)
        for number, answer in enumerate(answers, 1):
            yield _sample(_question(name, headings, number, len(answers)), answer)


def _question(name: str, headings: Sequence[str], number: int, count: int) -> str:
    about = f" about {' / '.join(headings)}" if headings else ""
    part = f" (part {number} of {count})" if count > 1 else ""
    return f"What does {name} say{about}?{part}"


def _sample(question: str, answer: str) -> Sample:
    return Sample(messages=[Message(role="user", content=question), Message(role="assistant", content=answer)])
