"""Turn a folder of documents into samples.

Each section of a Markdown file, and each text file, becomes an answer to a question about that file. Files of samples
(.jsonl) are used unchanged. A git repository is read like any other folder. Hidden files, links, installed packages and
files of other types are ignored.
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
"""Paragraphs of a text are joined up to this length, so that an answer fits the context of small models."""

HEADING = re.compile(r"(#{1,6})\s+(.*?)(?:\s+#+)?\s*")
FENCE = re.compile(r"\s{0,3}(`{3,}|~{3,})(.*)")
FRONT_MATTER = re.compile(r"\A---\n.*?\n(---|\.\.\.)(\n|\Z)", re.DOTALL)


class TooManyDocuments(InvalidRequest):
    """The folder has too many documents."""

    code = "TOO_MANY_DOCUMENTS"


class NoDocument(InvalidRequest):
    """The folder has no document with text in it."""

    code = "NO_DOCUMENT"


class UnreadableDocument(InvalidRequest):
    """A document cannot be read."""

    code = "UNREADABLE_DOCUMENT"


@dataclass
class FolderContent:
    """The samples of a folder, and which files they are from."""

    samples: list[Sample] | list[PreferencePair] = field(default_factory=list[Sample])
    files: int = 0
    skipped: list[str] = field(default_factory=list[str])  # have the extension of a document, but are not UTF-8 text


def read_folder(folder: Path) -> FolderContent:
    """Turn all documents of a folder into samples, in the order of their paths."""
    content = FolderContent()
    samples: list[Sample | PreferencePair] = []
    size = 0
    for path in _documents(folder):
        name = printable_path(path.relative_to(folder))
        size += path.stat().st_size
        if content.files == MAX_FILES or size > MAX_BYTES:
            raise TooManyDocuments(
                f"{folder} has more than {MAX_FILES} documents or {MAX_BYTES // 1024 // 1024} MiB: name a subfolder."
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
        raise InvalidRequest(f"{folder} has both preference pairs and other documents: name a folder with one kind.")
    content.samples = samples  # pyright: ignore[reportAttributeAccessIssue]
    return content


def sections(text: str) -> Iterator[tuple[list[str], str]]:
    """The sections of a Markdown text: for each, its headings, outermost first, and its content."""
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
    """Split a text into chunks of whole paragraphs. Only a paragraph that is too long by itself is cut."""
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
    """The code fence that is open after this line, empty outside of code."""
    match = FENCE.fullmatch(line)
    if match is None:
        return fence
    if not fence:
        return match[1]
    return "" if match[1].startswith(fence) and not match[2].strip() else fence


def printable_path(path: Path) -> str:
    """A path as text that can be stored, even if its name is not UTF-8."""
    return os.fsencode(path.as_posix()).decode(errors="replace")


def _documents(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder, onerror=_raise_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in IGNORED_FOLDERS)
        for name in sorted(names):
            path = Path(parent, name)
            is_document = path.suffix.lower() in MARKDOWN_EXTENSIONS | TEXT_EXTENSIONS | SAMPLE_EXTENSIONS
            # A link could lead out of the folder, and reading a pipe or a device may never end.
            if is_document and not name.startswith(".") and not path.is_symlink() and path.is_file():
                yield path


def _raise_unreadable(error: OSError) -> None:
    raise UnreadableDocument(f"{error.filename} cannot be read: {error.strerror}.") from error


def _read_text(path: Path) -> str | None:
    """The text of a file, or None if it is not UTF-8 text."""
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
