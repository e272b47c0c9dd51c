"""Processes that share the registry, whose turn it is among tenants, and whose an unfinished request is."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "processes",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("seat", sa.String(length=64), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("alive_until", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.add_column("tenants", sa.Column("weight", sa.Float(), nullable=False, server_default="1"))
    op.add_column("tenants", sa.Column("prepare_turn", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("tenants", sa.Column("train_turn", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("idempotency", sa.Column("process_id", sa.String(length=64), nullable=True))


def downgrade() -> None:
    op.drop_column("idempotency", "process_id")
    for column in ("train_turn", "prepare_turn", "weight"):
        op.drop_column("tenants", column)
    op.drop_table("processes")
