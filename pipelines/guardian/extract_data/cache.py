"""The cache of extracted examples: one SQLite file per repository, so that only changed files are extracted again.

It also holds all examples of a run until they are written, so that no repository has to fit into memory. If the file is
lost or damaged, it is created again.
"""

import hashlib
import sqlite3
from array import array
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import orjson

from pipelines.guardian.extract_data import comments, file_filter, languages, per_file, questions, secret_scan, symbols
from pipelines.guardian.extract_data.per_file import Extract
from pipelines.guardian.extract_data.questions import Example
from pipelines.training.data import documents

COMMIT_PREFIX = "/commit/"
"""The prefix of the keys of commits. No path in a repository begins with a slash."""

SCHEMA = """
CREATE TABLE extract (
    key TEXT PRIMARY KEY, blob TEXT NOT NULL, reason TEXT, language TEXT NOT NULL, facts BLOB NOT NULL,
    kinds TEXT NOT NULL, numbers BLOB NOT NULL, texts BLOB NOT NULL
)
"""
KIND_LETTERS = {"purpose": "p", "section": "s", "code": "c", "where": "w", "complete": "r", "commit": "m"}
KIND_OF = {letter: kind for kind, letter in KIND_LETTERS.items()}
HASHES_PER_EXAMPLE, TEXTS_PER_EXAMPLE = 3, 3
"""An example has a question, a question with its path, and an answer."""

PreparedExample = tuple[str, int, int, int, bytes, bytes, bytes]
"""An example, ready to be compared and written: its kind; the hashes of its question, of the question with its path and
of its answer; then, as JSON, both questions and the rest of its line up to the commit. Without a question with a path,
its hash is 0 and its text b"".
"""

PAGE_BYTES = 32_768
"""Large pages, because the texts of one file take many kilobytes."""
BUSY_SECONDS = 60


@dataclass(frozen=True)
class Summary:
    key: str
    reason: str | None
    language: str
    leaks: list[tuple[int, str]]
    withheld: int
    paths: list[str]
    kinds: str  # of its examples, one letter each
    question_hashes: "array[int]"


class ExtractCache:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def blobs(self) -> dict[str, str]:
        """For each key, the id of the object that it was extracted from."""
        return dict(self._connection.execute("SELECT key, blob FROM extract WHERE key != ''"))

    def put(self, rows: Iterable[tuple[str, str, Extract]]) -> None:
        """Store rows of (key, blob, extract) in one transaction."""
        with self._connection:
            self._connection.executemany(
                "INSERT OR REPLACE INTO extract VALUES (?, ?, ?, ?, ?, ?, ?, ?)", map(_row, rows)
            )

    def remove(self, keys: Iterable[str]) -> None:
        with self._connection:
            self._connection.executemany("DELETE FROM extract WHERE key = ?", ((key,) for key in keys))

    def summaries(self) -> Iterator[Summary]:
        """Summaries of all keys, in their order, without the texts of the examples."""
        rows = self._connection.execute(
            "SELECT key, reason, language, facts, kinds, numbers FROM extract WHERE key != '' ORDER BY key"
        )
        for key, reason, language, facts, kinds, stored_hashes in rows:
            locations, withheld, paths = orjson.loads(facts)
            hashes = _load_hashes(stored_hashes)[0::HASHES_PER_EXAMPLE]
            yield Summary(
                key, reason, language, [(line, kind) for line, kind in locations], withheld, paths, kinds, hashes
            )

    def examples(self, key: str) -> Iterator[PreparedExample]:
        query = "SELECT kinds, numbers, texts FROM extract WHERE key = ?"
        kinds, stored_hashes, texts = self._connection.execute(query, (key,)).fetchone()
        hashes, parts = _load_hashes(stored_hashes), texts.split(b"\n")
        return zip(
            map(KIND_OF.__getitem__, kinds),
            *(hashes[index::HASHES_PER_EXAMPLE] for index in range(HASHES_PER_EXAMPLE)),
            *(parts[index::TEXTS_PER_EXAMPLE] for index in range(TEXTS_PER_EXAMPLE)),
            strict=False,  # the last text is followed by an empty one
        )


@contextmanager
def open_cache(path: Path, limit: int) -> Generator[ExtractCache]:
    """Open a cache. It is cleared if it was written by another extractor, or with another limit of characters."""
    path.parent.mkdir(parents=True, exist_ok=True)
    expected = f"{extractor()}-{limit}"
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS)
    try:
        # After a power cut, lost rows are extracted again.
        connection.execute("PRAGMA synchronous = OFF")
        known = connection.execute("PRAGMA user_version").fetchone()[0]
        usable = known and connection.execute("SELECT blob FROM extract WHERE key = ''").fetchone() == (expected,)
    except sqlite3.DatabaseError:
        usable = False
    if not usable:
        connection.close()
        for file in path.parent.glob(f"{path.name}*"):
            file.unlink(missing_ok=True)
        connection = sqlite3.connect(path, timeout=BUSY_SECONDS)
        connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        connection.execute("PRAGMA synchronous = OFF")
        with connection:
            connection.execute(SCHEMA)
            connection.execute("INSERT INTO extract VALUES ('', ?, NULL, '', '', '', '', '')", (expected,))
            connection.execute("PRAGMA user_version = 1")
    with closing(connection):
        yield ExtractCache(connection)


def hash_text(text: str) -> int:
    """A hash of 64 bits, by which texts are compared."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@cache
def extractor() -> str:
    """The version of the extractor: a hash of its code and of the grammars that it uses."""
    digest = hashlib.sha256()
    for module in (comments, documents, per_file, languages, secret_scan, questions, file_filter, symbols):
        digest.update(Path(str(module.__file__)).read_bytes())
    digest.update(Path(__file__).read_bytes())
    for package in ("tree-sitter", *languages.PACKAGES, "detect-secrets"):
        digest.update(f"{package}={version(package)};".encode())
    return digest.hexdigest()[:32]


def _row(row: tuple[str, str, Extract]) -> tuple[object, ...]:
    key, blob, extract = row
    kinds = "".join(KIND_LETTERS[example.kind] for example in extract.examples)
    hashes = array("Q", (hash_ for example in extract.examples for hash_ in _hashes_of(example)))
    texts = b"".join(_texts_of(key, example) for example in extract.examples)
    facts = orjson.dumps([extract.leaks, extract.withheld, extract.paths])
    return key, blob, extract.reason, extract.language, facts, kinds, hashes.tobytes(), texts


def _hashes_of(example: Example) -> tuple[int, int, int]:
    with_path = 0 if example.question_with_path is None else hash_text(example.question_with_path)
    return hash_text(example.question), with_path, hash_text(" ".join(example.answer.split()))


def _texts_of(key: str, example: Example) -> bytes:
    """Both questions as JSON, and the rest of the sample's line after the question, up to the commit."""
    location = {} if key.startswith(COMMIT_PREFIX) else {"path": key, "lines": [example.first, example.last]}
    source = orjson.dumps({"kind": example.kind, **location, "commit": ""}).removesuffix(b'"}')
    with_path = b"" if example.question_with_path is None else orjson.dumps(example.question_with_path)
    rest = b'},{"role":"assistant","content":' + orjson.dumps(example.answer) + b'}],"source":' + source
    return b"\n".join((orjson.dumps(example.question), with_path, rest, b""))


def _load_hashes(stored: bytes) -> "array[int]":
    numbers = array("Q")
    numbers.frombytes(stored)
    return numbers
