"""`tenora tenants`: over HTTP where a server runs, else on the database of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from tenora.cli.connection import connect
from tenora.cli.groups import Group
from tenora.cli.output import moment, show_table
from tenora.cli.registry import Local, operate
from tenora.control.tenancy.records import TenantRecord
from tenora_client import Client, Tenant

if TYPE_CHECKING:
    from tenora.control.tenancy.bootstrap import Registry

app = typer.Typer(cls=Group, no_args_is_help=True, help="Tenants, for the operator: create, list, update, delete.")


@app.command()
def create(name: str, local: Local = False) -> None:
    """Create a tenant."""

    async def work(registry: Registry) -> TenantRecord:
        return await registry.tenants.create(name)

    tenant = operate(lambda client: client.admin.tenants.create(name), work, local=local)
    typer.echo(f"{tenant.name} is created ({tenant.id}). Next: tenora keys create --tenant {tenant.name} --scope infer")


@app.command("list")
def list_(local: Local = False) -> None:
    """All tenants."""

    def ask(client: Client) -> Sequence[Tenant]:
        return list(client.admin.tenants.list())

    async def work(registry: Registry) -> Sequence[TenantRecord]:
        return await registry.tenants.list()

    rows = operate(ask, work, local=local)
    show_table(
        ("name", "id", "created_at", "weight"),
        ((row.name, row.id, moment(row.created_at), f"{row.weight:g}") for row in rows),
    )


@app.command()
def update(
    name: str,
    weight: Annotated[float, typer.Option(help="Its share of the workers beside other tenants, 0.01 to 100.")],
    local: Local = False,
) -> None:
    """Give a tenant another share of the workers; usual is 1."""

    async def work(registry: Registry) -> TenantRecord:
        return await registry.tenants.set_weight(name, weight)

    tenant = operate(lambda client: client.admin.tenants.update(name, weight=weight), work, local=local)
    typer.echo(f"{tenant.name} has the weight {tenant.weight:g}.")


@app.command()
def delete(
    name: str, yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask whether that is meant.")] = False
) -> None:
    """Delete a tenant with its keys, jobs, files and adapters; a server must run, which ends what runs for it."""
    with connect() as client:
        client.admin.tenants.get(name)  # a name that there is not is told before the question
        if not yes:
            typer.confirm(f"Delete {name} with its keys, jobs, files and adapters?", abort=True, err=True)
        client.admin.tenants.delete(name)
    typer.echo(f"{name} is deleted.")
