"""Run by Alembic. The connection, already inside a transaction, comes from `tenora.control.registry.database`."""

from __future__ import annotations

from alembic import context

from tenora.control.registry.tables import Base

context.configure(
    connection=context.config.attributes["connection"], target_metadata=Base.metadata, render_as_batch=True
)
with context.begin_transaction():
    context.run_migrations()
