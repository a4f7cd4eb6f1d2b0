"""Find the function of a job by its kind, so that it may move to another module."""

from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    op.drop_column("jobs", "entrypoint")
