"""The environment in which Alembic runs migrations, on the connection of cluster.migrations.configuration."""

from typing import Any, Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext
from sqlalchemy import JSON

from cluster.db import Base, UtcDateTime
from cluster.migrations import import_tables

import_tables()


def render_item(kind: str, item: Any, autogenerate: AutogenContext) -> str | Literal[False]:
    """Render our column types as types of SQLAlchemy: a migration must not change when our code does."""
    if kind == "type" and isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    if kind == "type" and isinstance(item, JSON):
        if "postgresql" not in item._variant_mapping:  # pyright: ignore[reportPrivateUsage]
            return "sa.JSON()"
        autogenerate.imports.add("from sqlalchemy.dialects import postgresql")
        return "sa.JSON().with_variant(postgresql.JSONB(), 'postgresql')"
    return False


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite cannot alter a column: the table is copied
    render_item=render_item,
)
with context.begin_transaction():
    context.run_migrations()
