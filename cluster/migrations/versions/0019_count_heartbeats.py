"""Count heartbeats instead of storing times of expiry, and remember the checkpoint at which a job lost its worker."""

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"


def upgrade() -> None:
    op.drop_column("jobs", "lease_expires_at")
    op.add_column("jobs", sa.Column("heartbeats", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("lost_checkpoint", sa.String(length=64), nullable=True))
    with op.batch_alter_table("leadership") as leadership:
        leadership.alter_column("expires_at", new_column_name="renewed_at")
        leadership.add_column(sa.Column("heartbeats", sa.Integer(), nullable=False, server_default="0"))
