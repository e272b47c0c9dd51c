"""What became of a job's result, and which rows a version has learned."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("published", sa.JSON(), nullable=True))
    op.add_column("adapter_versions", sa.Column("rows", sa.LargeBinary(), nullable=True))


def downgrade() -> None:
    op.drop_column("adapter_versions", "rows")
    op.drop_column("jobs", "published")
