"""Count the bytes of responses."""

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"


def upgrade() -> None:
    op.add_column("responses", sa.Column("bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.execute("UPDATE responses SET bytes = length(CAST(given AS TEXT)) + length(CAST(body AS TEXT))")
    op.drop_index("ix_responses_owner_id", table_name="responses")
    op.create_index("ix_responses_owner_id_bytes", "responses", ["owner_id", "bytes"])
