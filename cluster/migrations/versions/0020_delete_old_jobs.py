"""Delete old jobs, and remember what is left of them elsewhere. Find by an index what /metrics counts."""

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"


def upgrade() -> None:
    op.create_table(
        "deleted_jobs",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("mlflow_run_id", sa.String(length=40), nullable=True),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_deleted_jobs")),
    )
    op.drop_index("ix_jobs_kind_state", table_name="jobs")
    op.create_index("ix_jobs_kind_state_finished_at", "jobs", ["kind", "state", "finished_at"])
    op.create_index(op.f("ix_schedule_ticks_job_id"), "schedule_ticks", ["job_id"])
    op.create_index(op.f("ix_idempotency_keys_job_id"), "idempotency_keys", ["job_id"])
    op.create_index(
        "ix_followed_downloads_striking",
        "followed_downloads",
        ["service_id"],
        sqlite_where=sa.text("strikes > 0"),
        postgresql_where=sa.text("strikes > 0"),
    )
