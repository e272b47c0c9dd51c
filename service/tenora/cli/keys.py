"""`tenora keys`: on the database of this machine, not over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from tenora.cli.output import moment, show_table
from tenora.cli.registry import on_registry
from tenora.control.tenancy.records import SCOPES, KeyRecord

if TYPE_CHECKING:
    from tenora.control.tenancy.bootstrap import Registry

app = typer.Typer(no_args_is_help=True, help="API keys, in the database of this machine: create, list, revoke.")
Scopes = Annotated[list[str], typer.Option("--scope", help=f"What it may do: {', '.join(SCOPES)}; repeat for several.")]
Tenant = Annotated[str, typer.Option("--tenant", help="The tenant's name.")]


@app.command()
def create(
    tenant: Tenant,
    scope: Annotated[
        list[str], typer.Option("--scope", help=f"What the key may do: {', '.join(SCOPES)}; repeat for several.")
    ],
    name: Annotated[str | None, typer.Option("--name", help="A note to tell keys apart.")] = None,
    expires_days: Annotated[float | None, typer.Option("--expires-days", min=0.01, help="Never, if absent.")] = None,
) -> None:
    """Create a key and print its secret, which is shown this once and kept nowhere."""

    async def work(registry: Registry) -> tuple[KeyRecord, str]:
        owner = await registry.tenants.get(tenant)
        expires_in = None if expires_days is None else round(expires_days * 86400)
        return await registry.keys.create(owner.id, scope, name=name, expires_in=expires_in)

    record, secret = on_registry(work)
    typer.echo(f"{record.id} may {', '.join(sorted(record.scopes))}. The secret is shown only now:", err=True)
    typer.echo(secret)


@app.command("list")
def list_(tenant: Tenant) -> None:
    """A tenant's keys, without their secrets."""

    async def work(registry: Registry) -> Sequence[KeyRecord]:
        return await registry.keys.list((await registry.tenants.get(tenant)).id)

    columns = ("id", "prefix", "scopes", "name", "created_at", "expires_at", "revoked_at")
    show_table(columns, (_row(record) for record in on_registry(work)))


def _row(record: KeyRecord) -> Sequence[object]:
    times = (moment(record.created_at), moment(record.expires_at), moment(record.revoked_at))
    return (record.id, record.prefix, ",".join(sorted(record.scopes)), record.name, *times)


@app.command()
def revoke(key_id: str, tenant: Tenant) -> None:
    """Revoke a key. Running servers forget it within TENORA_KEY_CACHE_SECONDS."""

    async def work(registry: Registry) -> KeyRecord:
        return await registry.keys.revoke((await registry.tenants.get(tenant)).id, key_id)

    typer.echo(f"{on_registry(work).id} is revoked.")
