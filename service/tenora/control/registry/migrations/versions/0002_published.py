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
    _plan_cross_validations_anew()


def downgrade() -> None:
    op.drop_column("adapter_versions", "rows")
    op.drop_column("jobs", "published")


def _plan_cross_validations_anew() -> None:
    """Folds hold out other rows than they did before, so learners that had begun would be measured on what they have
    learned. Their jobs read their files again, which removes what was saved."""
    jobs = sa.table(
        "jobs", sa.column("id", sa.String()), sa.column("status", sa.String()), sa.column("plan", sa.JSON())
    )
    unfinished = sa.select(jobs.c.id, jobs.c.plan).where(jobs.c.status.in_(("queued", "running", "paused")))
    found = [row.id for row in op.get_bind().execute(unfinished) if row.plan and row.plan["folds"]]
    op.execute(sa.update(jobs).where(jobs.c.id.in_(found)).values(plan=sa.null()))
