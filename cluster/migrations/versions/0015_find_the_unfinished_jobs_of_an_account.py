"""Find the unfinished jobs of an account, which are counted whenever it queues another."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    unfinished = sa.text("owner_id IS NOT NULL AND parent_id IS NULL AND state IN ('queued', 'running', 'paused')")
    op.create_index("ix_jobs_unfinished", "jobs", ["owner_id"], sqlite_where=unfinished, postgresql_where=unfinished)
