"""`tenora tenants`: on the database of this machine, not over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from tenora.cli.output import moment, show_table
from tenora.cli.registry import on_registry
from tenora.control.tenancy.records import TenantRecord

if TYPE_CHECKING:
    from tenora.control.tenancy.bootstrap import Registry

app = typer.Typer(no_args_is_help=True, help="Tenants, in the database of this machine: create, list.")


@app.command()
def create(name: str) -> None:
    """Create a tenant."""

    async def work(registry: Registry) -> TenantRecord:
        return await registry.tenants.create(name)

    tenant = on_registry(work)
    typer.echo(f"{tenant.name} is created ({tenant.id}). Next: tenora keys create --tenant {tenant.name} --scope infer")


@app.command("list")
def list_() -> None:
    """All tenants."""

    async def work(registry: Registry) -> Sequence[TenantRecord]:
        return await registry.tenants.list()

    rows = on_registry(work)
    show_table(("name", "id", "created_at"), ((row.name, row.id, moment(row.created_at)) for row in rows))
