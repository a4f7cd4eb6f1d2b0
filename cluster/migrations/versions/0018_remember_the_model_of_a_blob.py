"""Remember the model of a blob."""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"


def upgrade() -> None:
    op.add_column("blobs", sa.Column("model", sa.Text(), nullable=True))
