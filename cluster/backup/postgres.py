"""A snapshot of a PostgreSQL database, and its restoration, with PostgreSQL's own programs."""

import asyncio
import os
import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from cluster import logs
from cluster.backup.errors import BackupFailed, RestoreFailed
from cluster.backup.manifest import Engine, Replacements
from cluster.db import Database, DatabaseUnavailable

KEEP_ALIVE_SECONDS = 10
"""Well below the time after which PostgreSQL ends a transaction that does nothing."""


class PostgresSnapshot:
    """The database as it was when the snapshot was taken. The transaction that holds it is open."""

    engine: Engine = "PostgreSQL"

    def __init__(self, url: str, connection: AsyncConnection, snapshot_id: str, revision: str, size: int) -> None:
        self._url, self._connection, self._snapshot_id = url, connection, snapshot_id
        self.revision, self.size = revision, size

    async def save(self, target: Path) -> None:
        dump = asyncio.create_task(
            _run(self._url, "pg_dump", "--format=custom", f"--snapshot={self._snapshot_id}", f"--file={target}")
        )
        try:
            while not dump.done():
                await asyncio.wait({dump}, timeout=KEEP_ALIVE_SECONDS)
                await self._connection.execute(text("SELECT 1"))
        finally:
            dump.cancel()
        if message := await dump:
            raise BackupFailed(f"pg_dump failed: {message}")


@asynccontextmanager
async def snapshot(url: str) -> AsyncGenerator[PostgresSnapshot]:
    _require("pg_dump")
    async with _connect(url) as connection:
        if not await _has_tables(connection):
            raise BackupFailed("The database that database.url names is empty: `forgearr up` was never run with it.")
        await connection.rollback()
        await connection.execution_options(isolation_level="REPEATABLE READ")
        snapshot_id = str(await connection.scalar(text("SELECT pg_export_snapshot()")))
        revision = str(await connection.scalar(text("SELECT version_num FROM alembic_version")))
        size = int(await connection.scalar(text("SELECT pg_database_size(current_database())")) or 0)
        yield PostgresSnapshot(url, connection, snapshot_id, revision, size)


async def has_tables(url: str) -> bool:
    async with _connect(url) as connection:
        return await _has_tables(connection)


def require_restore() -> None:
    _require("pg_restore")


async def restore(url: str, dump: Path) -> None:
    """Restore a dump, or nothing."""
    name = make_url(url).database or ""
    message = await _run(url, "pg_restore", "--exit-on-error", "--single-transaction", f"--dbname={name}", str(dump))
    if message:
        raise RestoreFailed(f"pg_restore failed, and nothing was restored: {message}")


async def replace_addresses(url: str, replacements: Replacements) -> None:
    """Replace the beginning of each text that begins with a folder, also in JSON documents.

    The audit log stays as it is.
    """
    columns = """
        SELECT table_name, column_name, data_type FROM information_schema.columns
        WHERE table_schema = 'public' AND table_name <> 'audit_log'
        AND data_type IN ('text', 'character varying', 'json', 'jsonb')
    """
    async with _connect(url) as connection:
        for table, column, kind in (await connection.execute(text(columns))).all():
            for old, new in replacements:
                await connection.execute(text(_replacement(table, column, kind)), {"old": old, "new": new})
        await connection.commit()


@asynccontextmanager
async def _connect(url: str) -> AsyncGenerator[AsyncConnection]:
    database = Database(url, 1)
    try:
        connection = await _opened(database)
        try:
            yield connection
        finally:
            await connection.close()
    finally:
        await database.close()


async def _opened(database: Database) -> AsyncConnection:
    try:
        return await database.engine.connect()
    except (OSError, SQLAlchemyError) as error:
        raise DatabaseUnavailable(
            f"The database that database.url names cannot be reached: {logs.redact(str(error))}"
        ) from error


async def _has_tables(connection: AsyncConnection) -> bool:
    query = "SELECT count(*) FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
    return bool(await connection.scalar(text(query)))


def _replacement(table: str, column: str, kind: str) -> str:
    name = f'"{column}"'
    if kind in {"json", "jsonb"}:
        quoted = """replace(replace(cast(:{0} AS text), '\\', '\\\\'), '"', '\\"')"""
        old, new = ("'\"' || " + quoted.format(part) for part in ("old", "new"))
        return f"""UPDATE "{table}" SET {name} = cast(replace(cast({name} AS text), {old}, {new}) AS {kind})
            WHERE position({old} in cast({name} AS text)) > 0"""  # noqa: S608
    return f"""UPDATE "{table}" SET {name} = cast(:new AS text) || substr({name}, length(cast(:old AS text)) + 1)
        WHERE starts_with({name}, cast(:old AS text))"""  # noqa: S608


def _require(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise BackupFailed(
            f"The database is PostgreSQL, and its program {program} is not installed: install PostgreSQL's client "
            "programs (in Debian the package postgresql-client), of the server's version or a newer one."
        )
    return path


async def _run(url: str, program: str, *arguments: str) -> str:
    """Run one of PostgreSQL's programs. Returns what it said if it failed, else an empty text."""
    command = [_require(program), "--no-owner", "--no-privileges", "--no-password", *arguments]
    process = await asyncio.create_subprocess_exec(
        *command,
        env=os.environ | _environment(url),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, output = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    message = " ".join(logs.redact(output.decode(errors="replace")).split())
    return (message or f"exit code {process.returncode}") if process.returncode else ""


def _environment(url: str) -> dict[str, str]:
    """The variables of PostgreSQL's programs: other accounts can read command lines."""
    parts = make_url(url)
    values = {
        "PGHOST": parts.host or parts.query.get("host"),
        "PGPORT": parts.port or parts.query.get("port"),
        "PGUSER": parts.username,
        "PGPASSWORD": parts.password,
        "PGDATABASE": parts.database,
        "PGSSLMODE": parts.query.get("ssl") or parts.query.get("sslmode"),
    }
    return {name: str(value) for name, value in values.items() if value}
