"""The migrations of the database's schema, and the code that runs them."""

from collections.abc import Awaitable, Callable
from importlib import import_module
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import Result, get_database
from cluster.errors import Conflict

FOLDER = Path(__file__).parent
# All modules with tables. They are imported by name, because `cluster` imports no package above it.
MODULES = (
    "cluster.audit_log",
    "cluster.identity",
    "cluster.services.circuit_breaker",
    "cluster.services.health_checks",
    "cluster.services.store",
    "cluster.files.tables",
    "jobs.tables",
    "pipelines.guardian.feedback.store",
    "pipelines.guardian.repositories",
    "pipelines.tools.calls",
    "pipelines.media.downloads.tables",
    "pipelines.media.downloads.log",
    "pipelines.media.audit.tables",
    "pipelines.training.models.blobs",
    "pipelines.training.data.datasets",
    "pipelines.training.workers",
    "pipelines.training.data.prompts",
    "pipelines.training.sessions",
    "serve.openai.batches.store",
    "serve.openai.responses.store",
)
# An arbitrary number, the same in every process of Forgearr.
POSTGRES_LOCK = 0x466F7267


class NewerSchema(Conflict):
    """The database was written by a newer version of Forgearr."""

    code = "NEWER_SCHEMA"


def import_tables() -> None:
    """Import all modules with tables, so that their metadata is complete."""
    for module in MODULES:
        import_module(module)


def upgrade(connection: Connection) -> None:
    """Migrate to the newest schema in the connection's transaction, so that it happens once and completely."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": POSTGRES_LOCK})
    config = configuration(connection)
    _refuse_newer(connection, ScriptDirectory.from_config(config))
    command.upgrade(config, "head")


def configuration(connection: Connection) -> Config:
    config = Config(attributes={"connection": connection})
    # Alembic reads % in an option as the start of a placeholder.
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def known_revisions() -> set[str]:
    """The schemas that this code can migrate from, and its own."""
    return _revisions(ScriptDirectory(str(FOLDER)))


def is_newest(revision: str) -> bool:
    return ScriptDirectory(str(FOLDER)).get_heads() == [revision]


def _revisions(scripts: ScriptDirectory) -> set[str]:
    return {script.revision for script in scripts.walk_revisions()}


def _refuse_newer(connection: Connection, scripts: ScriptDirectory) -> None:
    known = _revisions(scripts)
    unknown = set(MigrationContext.configure(connection).get_current_heads()) - known
    if unknown:
        raise NewerSchema(
            f"The database was written by a newer version of Forgearr (schema {', '.join(sorted(unknown))}): "
            "install that version again, or restore an older backup."
        )


async def migrate() -> None:
    """Migrate the database to the newest schema of this code. A database with a newer schema is refused."""
    database = get_database()
    if database.is_sqlite:
        _keep_private(Path(str(database.engine.url.database)))
    async with database.engine.connect() as connection:
        if not database.is_sqlite:
            async with connection.begin():
                return await connection.run_sync(upgrade)
        # SQLite alters a table by copying and dropping it. With foreign keys on, the drop would delete the rows that
        # refer to it. The pragma has no effect inside a transaction, and SQLAlchemy always opens one: hence the driver.
        raw = (await connection.get_raw_connection()).driver_connection
        assert raw is not None
        await raw.execute("PRAGMA foreign_keys = OFF")
        try:
            async with connection.begin():
                await connection.run_sync(upgrade)
        finally:
            await raw.execute("PRAGMA foreign_keys = ON")


def _keep_private(path: Path) -> None:
    """Create SQLite's file for this account only. SQLite gives the files beside it the same mode."""
    path.touch(mode=0o600)
    for file in path.parent.glob(f"{path.name}*"):
        file.chmod(0o600)


async def run_in_own_session(work: Callable[[AsyncSession], Awaitable[Result]]) -> Result:
    """Migrate the database, call `work` in one transaction, and close the database. It is for short commands."""
    try:
        await migrate()
        async with get_database().transaction() as session:
            return await work(session)
    finally:
        await get_database().close()
