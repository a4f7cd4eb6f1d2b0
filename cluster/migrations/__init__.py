"""The history of the database's schema, and how to bring a database up to it."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from cluster.errors import Conflict

FOLDER = Path(__file__).parent
# Any number will do, as long as every process of Forgearr takes the same.
POSTGRES_LOCK = 0x466F7267


class NewerSchema(Conflict):
    """The database was written by a newer version of Forgearr."""

    code = "NEWER_SCHEMA"


def upgrade(connection: Connection) -> None:
    """Migrate to the newest schema inside the connection's transaction, so that it happens once and wholly."""
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


def _refuse_newer(connection: Connection, scripts: ScriptDirectory) -> None:
    known = {script.revision for script in scripts.walk_revisions()}
    unknown = set(MigrationContext.configure(connection).get_current_heads()) - known
    if unknown:
        raise NewerSchema(
            f"The database was written by a newer version of Forgearr (schema {', '.join(sorted(unknown))}): "
            "install that version again, or restore a backup made before it."
        )
