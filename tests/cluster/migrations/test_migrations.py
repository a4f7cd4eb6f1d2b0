"""Migrations build the tables in the code, on both databases, and keep existing rows."""

import asyncio
import shutil
import sys
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import IntegrityError

from cluster import identity, migrations
from cluster.db import Base, Database
from cluster.migrations import migrate

pytestmark = pytest.mark.both_databases

NEXT_MIGRATION = """
import sqlalchemy as sa
from alembic import op

revision = "next"
down_revision = {head!r}


def upgrade() -> None:
    with op.batch_alter_table("users") as batch:
        batch.add_column(sa.Column("nickname", sa.String(50)))
        batch.alter_column("full_name", type_=sa.String(300))  # makes SQLite copy the table
"""


def head() -> str:
    return ScriptDirectory(str(migrations.FOLDER)).get_current_head() or ""


# SQLite does not report the expression of an index. The migrations are the same for both.
@pytest.mark.parametrize("database", ["postgres"], indirect=True)
async def test_migrations_build_the_tables_in_the_code(database: Database) -> None:
    def difference(connection: Connection) -> list[object]:
        return compare_metadata(MigrationContext.configure(connection), Base.metadata)

    async with database.engine.connect() as connection:
        assert await connection.run_sync(difference) == []


async def test_migrating_again_changes_nothing(database: Database) -> None:
    await migrate()
    await migrate()
    async with database.engine.connect() as connection:
        versions = list(await connection.scalars(text("SELECT version_num FROM alembic_version")))
    assert versions == [head()]


async def test_an_older_schema_migrates_and_keeps_its_rows(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with database.transaction() as session:
        user = await identity.add_user(session, email="ada@example.com", username="ada", password_hash="x")
        await identity.create_key(session, user.id, "laptop")
    newer_code = tmp_path / "migrations"
    shutil.copytree(migrations.FOLDER, newer_code)
    (newer_code / "versions" / "next.py").write_text(NEXT_MIGRATION.format(head=head()))
    monkeypatch.setattr(migrations, "FOLDER", newer_code)
    await migrate()
    async with database.read_transaction() as session:
        assert await session.scalar(text("SELECT count(*) FROM users WHERE nickname IS NULL")) == 1
        assert [key.name for key, _ in await identity.list_keys(session)] == ["laptop"]
    with pytest.raises(IntegrityError):
        async with database.transaction() as session:
            await identity.create_key(session, "nobody", "orphan")


def test_usernames_that_differ_by_case_only_get_a_number(tmp_path: Path) -> None:
    insert = (
        "INSERT INTO users (id, email, username, password_hash, role, is_active, created_at) "
        "VALUES (:id, :id, :username, '-', 'user', 1, :created_at)"
    )
    names = ["Ann", "ann-2", "ANN", "ann", "bob"]
    engine = create_engine(f"sqlite:///{tmp_path / 'old.db'}")
    with engine.begin() as connection:
        command.upgrade(migrations.configuration(connection), "0014")
        for number, username in enumerate(names):
            values = {"id": str(number), "username": username, "created_at": f"2026-01-0{number + 1} 00:00:00"}
            connection.execute(text(insert), values)
        migrations.upgrade(connection)
        rows = connection.execute(text("SELECT username, username_key, token_version FROM users ORDER BY id")).all()
    engine.dispose()
    renamed = ["Ann", "ann-2", "ANN-3", "ann-4", "bob"]
    assert [tuple(row) for row in rows] == [(name, name.lower(), 0) for name in renamed]


async def test_a_newer_schema_is_refused(database: Database) -> None:
    await migrate()
    async with database.transaction() as session:
        await session.execute(text("DELETE FROM alembic_version"))
        await session.execute(text("INSERT INTO alembic_version VALUES ('9999')"))
    with pytest.raises(migrations.NewerSchema, match="schema 9999"):
        await migrate()


async def test_concurrent_processes_migrate_once(database: Database) -> None:
    script = "import asyncio; from cluster.migrations import migrate; asyncio.run(migrate())"
    processes = [await asyncio.create_subprocess_exec(sys.executable, "-c", script) for _ in range(2)]
    assert [await process.wait() for process in processes] == [0, 0]
