"""Remember where a download stood still."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    op.add_column("recoveries", sa.Column("stood_at", sa.BigInteger(), nullable=True))
