"""Create the table of jobs."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create one row for each job: its document, and columns to search by."""
    op.create_table(
        "gradcam_jobs",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("network", sa.String(256)),
        sa.Column("error_code", sa.String(64)),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("completed_at", sa.DateTime(timezone=True)),
        sa.Column("document", sa.Text, nullable=False),
    )
    op.create_index("gradcam_jobs_status", "gradcam_jobs", ["status", "updated_at"])
    op.create_index("gradcam_jobs_completed", "gradcam_jobs", ["completed_at"])
