"""A snapshot of an SQLite database, and what is changed in a copy of one."""

import json
import sqlite3
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path

from cluster.backup.errors import BackupFailed
from cluster.backup.manifest import Engine, Replacements
from cluster.db import BUSY_TIMEOUT_SECONDS

TEXT_TYPES = ("CHAR", "TEXT", "JSON", "CLOB")


class SqliteSnapshot:
    """The database as it was when the snapshot was taken. The transaction that holds it is open."""

    engine: Engine = "SQLite"

    def __init__(self, connection: sqlite3.Connection, revision: str, size: int) -> None:
        self._connection = connection
        self.revision, self.size = revision, size

    async def save(self, target: Path) -> None:
        _copy(self._connection, target)


@asynccontextmanager
async def snapshot(path: Path) -> AsyncGenerator[SqliteSnapshot]:
    with _reading(path) as connection:
        (revision,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        (page_size,) = connection.execute("PRAGMA page_size").fetchone()
        yield SqliteSnapshot(connection, str(revision), pages * page_size)


def copy(path: Path, target: Path) -> None:
    """Copy a database that is in use."""
    with _reading(path) as connection:
        _copy(connection, target)


def replace_addresses(path: Path, replacements: Replacements) -> None:
    """Replace the beginning of each text that begins with a folder, also in JSON documents.

    The audit log stays as it is.
    """
    with closing(sqlite3.connect(path)) as connection, connection:
        query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name <> 'audit_log'"
        tables = connection.execute(query).fetchall()
        for (table,) in tables:
            for _, column, kind, *_ in connection.execute(f'PRAGMA table_info("{table}")').fetchall():
                if any(name in str(kind).upper() for name in TEXT_TYPES):
                    for old, new in replacements:
                        _replace(connection, f'"{table}"', f'"{column}"', old, new)


@contextmanager
def _reading(path: Path) -> Generator[sqlite3.Connection]:
    if not path.is_file():
        raise BackupFailed(f"There is no database {path}: Forgearr was never started in this FORGEARR_HOME.")
    address = f"{path.absolute().as_uri()}?mode=rw"
    with closing(sqlite3.connect(address, uri=True, isolation_level=None, timeout=BUSY_TIMEOUT_SECONDS)) as connection:
        connection.execute("BEGIN")
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()  # the snapshot is taken by the first read
        yield connection


def _copy(source: sqlite3.Connection, target: Path) -> None:
    target.touch(mode=0o600)
    with closing(sqlite3.connect(target)) as copied:
        source.backup(copied)
        (verdict,) = copied.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise BackupFailed(f"The database is damaged, and a backup of it would be too: {verdict}.")


def _replace(connection: sqlite3.Connection, table: str, column: str, old: str, new: str) -> None:
    """In a column of text a folder is at its beginning, or after a quotation mark if the text is JSON."""
    connection.execute(
        f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",  # noqa: S608
        (new, len(old) + 1, len(old), old),
    )
    quoted_old, quoted_new = (json.dumps(folder)[:-1] for folder in (old, new))
    connection.execute(
        f"UPDATE {table} SET {column} = replace({column}, ?, ?) "  # noqa: S608
        f"WHERE substr({column}, 1, 1) IN ('{{', '[', '\"') AND instr({column}, ?)",
        (quoted_old, quoted_new, quoted_old),
    )
