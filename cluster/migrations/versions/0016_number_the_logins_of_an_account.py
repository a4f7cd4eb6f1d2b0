"""Number the generations of an account's access tokens, and make usernames unique without regard to case."""

from itertools import count

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"

USERS = sa.table("users", *(sa.column(name) for name in ("id", "username", "username_key", "created_at")))


def upgrade() -> None:
    op.add_column("users", sa.Column("token_version", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("users", sa.Column("username_key", sa.String(length=50), nullable=True))
    _fill_keys()
    with op.batch_alter_table("users") as batch_op:
        batch_op.alter_column("token_version", existing_type=sa.Integer(), server_default=None)
        batch_op.alter_column("username_key", existing_type=sa.String(length=50), nullable=False)
        batch_op.drop_constraint(op.f("uq_users_username"), type_="unique")
        batch_op.create_unique_constraint(op.f("uq_users_username_key"), ["username_key"])


def _fill_keys() -> None:
    """Of two usernames that differ by case only, the later account gets a number behind its own."""
    connection = op.get_bind()
    rows = connection.execute(sa.select(USERS.c.id, USERS.c.username).order_by(USERS.c.created_at, USERS.c.id)).all()
    taken = {username.lower() for _, username in rows}
    given: set[str] = set()
    for user_id, username in rows:
        if username.lower() in given:
            numbered = (f"{username[:40]}-{number}" for number in count(2))
            username = next(name for name in numbered if name.lower() not in taken)
            taken.add(username.lower())
        given.add(username.lower())
        values = {"username": username, "username_key": username.lower()}
        connection.execute(USERS.update().where(USERS.c.id == user_id).values(values))
