"""Number the generations of an account's access tokens."""

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0014"


def upgrade() -> None:
    op.add_column("users", sa.Column("token_version", sa.Integer(), nullable=False, server_default="0"))
    with op.batch_alter_table("users") as batch_op:
        batch_op.alter_column("token_version", existing_type=sa.Integer(), server_default=None)
