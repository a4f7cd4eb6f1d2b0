"""Remember the model of a blob."""

import sqlalchemy as sa
from alembic import op

revision = "0025"
down_revision = "0014"


def upgrade() -> None:
    op.add_column("blobs", sa.Column("model", sa.Text(), nullable=True))
