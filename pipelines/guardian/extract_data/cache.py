"""What was extracted from each file of a repository, kept so that only what changes is extracted again.

One SQLite file for each repository, in the cache of this machine. It is also where the examples wait until all of them
are there, so that no repository has to fit into memory. It may be lost or broken at any time: then it is made anew.
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
"""How the keys of commits begin. No path in a repository begins with a slash."""

SCHEMA = """
CREATE TABLE extract (
    key TEXT PRIMARY KEY, blob TEXT NOT NULL, reason TEXT, language TEXT NOT NULL, facts BLOB NOT NULL,
    kinds TEXT NOT NULL, numbers BLOB NOT NULL, texts BLOB NOT NULL
)
"""
KIND_LETTERS = {"purpose": "p", "section": "s", "code": "c", "where": "w", "complete": "r", "commit": "m"}
KIND_OF = {letter: kind for kind, letter in KIND_LETTERS.items()}
HASHES_PER_EXAMPLE, TEXTS_PER_EXAMPLE = 3, 3
"""Of each example: of its question, its exact question and its answer."""

PreparedExample = tuple[str, int, int, int, bytes, bytes, bytes]
"""An example, ready to be compared and written: its kind, the numbers of its question, of its exact question and of its
answer; then, as JSON, these two questions and the rest of its line up to the commit. Without an exact question, that is
0 and b"".
"""

PAGE_BYTES = 32_768
"""The texts of one file are many kilobytes."""
BUSY_SECONDS = 60


@dataclass(frozen=True)
class Summary:
    key: str
    reason: str | None
    language: str
    leaks: list[tuple[int, str]]
    withheld: int
    paths: list[str]
    kinds: str  # of its examples, a letter each
    question_hashes: "array[int]"  # the numbers of their questions


class ExtractCache:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def blobs(self) -> dict[str, str]:
        """Of each key, what it was extracted from."""
        return dict(self._connection.execute("SELECT key, blob FROM extract WHERE key != ''"))

    def put(self, rows: Iterable[tuple[str, str, Extract]]) -> None:
        """All of them, or none: (key, blob, what came of it)."""
        with self._connection:
            self._connection.executemany(
                "INSERT OR REPLACE INTO extract VALUES (?, ?, ?, ?, ?, ?, ?, ?)", map(_row, rows)
            )

    def remove(self, keys: Iterable[str]) -> None:
        with self._connection:
            self._connection.executemany("DELETE FROM extract WHERE key = ?", ((key,) for key in keys))

    def summaries(self) -> Iterator[Summary]:
        """What there is of each key, in their order, without the examples themselves."""
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
            strict=False,  # behind the last text there is an empty one
        )


@contextmanager
def open_cache(path: Path, limit: int) -> Generator[ExtractCache]:
    """What is kept in this file, if it is of this extractor, with this limit of characters; else nothing is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    expected = f"{extractor()}-{limit}"
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS)
    try:
        # What a crash of the machine takes from a cache is extracted again.
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
    """64 bits by which texts are compared."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@cache
def extractor() -> str:
    """Which extractor this is: another code, or another grammar, finds other things."""
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
    exact = 0 if example.question_with_path is None else hash_text(example.question_with_path)
    return hash_text(example.question), exact, hash_text(" ".join(example.answer.split()))


def _texts_of(key: str, example: Example) -> bytes:
    """Its questions, and what comes behind them in the line that samples.line_of makes of it."""
    where = {} if key.startswith(COMMIT_PREFIX) else {"path": key, "lines": [example.first, example.last]}
    source = orjson.dumps({"kind": example.kind, **where, "commit": ""}).removesuffix(b'"}')
    exact = b"" if example.question_with_path is None else orjson.dumps(example.question_with_path)
    rest = b'},{"role":"assistant","content":' + orjson.dumps(example.answer) + b'}],"source":' + source
    return b"\n".join((orjson.dumps(example.question), exact, rest, b""))


def _load_hashes(stored: bytes) -> "array[int]":
    numbers = array("Q")
    numbers.frombytes(stored)
    return numbers
