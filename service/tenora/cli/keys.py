"""`tenora keys`: over HTTP where a server runs, else on the database of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from tenora.cli.groups import Group
from tenora.cli.output import moment, show_table
from tenora.cli.registry import Local, operate
from tenora.control.tenancy.records import LONGEST_KEY_LIFE, SCOPES, KeyRecord
from tenora_client import ApiKey, Client

if TYPE_CHECKING:
    from tenora.control.tenancy.bootstrap import Registry

app = typer.Typer(cls=Group, no_args_is_help=True, help="API keys of tenants, for the operator: create, list, revoke.")
_DAY = 24 * 3600
Tenant = Annotated[str, typer.Option("--tenant", help="The tenant's name.")]


@app.command()
def create(
    tenant: Tenant,
    scope: Annotated[
        list[str], typer.Option("--scope", help=f"What the key may do: {', '.join(SCOPES)}; repeat for several.")
    ],
    name: Annotated[str | None, typer.Option("--name", help="A note to tell keys apart.")] = None,
    expires_days: Annotated[
        float | None,
        typer.Option("--expires-days", min=0.01, max=LONGEST_KEY_LIFE / _DAY, help="Never, if absent."),
    ] = None,
    local: Local = False,
) -> None:
    """Create a key and print its secret, which is shown this once and kept nowhere."""
    expires_in = None if expires_days is None else round(expires_days * _DAY)

    def ask(client: Client) -> tuple[ApiKey, str]:
        made = client.admin.keys.create(tenant, scope, name=name, expires_in=expires_in)
        return made, made.secret

    async def work(registry: Registry) -> tuple[KeyRecord, str]:
        owner = await registry.tenants.get(tenant)
        return await registry.keys.create(owner.id, scope, name=name, expires_in=expires_in)

    record, secret = operate(ask, work, local=local)
    typer.echo(f"{record.id} may {', '.join(sorted(record.scopes))}. The secret is shown only now:", err=True)
    typer.echo(secret)


@app.command("list")
def list_(tenant: Tenant, local: Local = False) -> None:
    """A tenant's keys, without their secrets."""

    def ask(client: Client) -> Sequence[ApiKey]:
        return list(client.admin.keys.list(tenant))

    async def work(registry: Registry) -> Sequence[KeyRecord]:
        return await registry.keys.list((await registry.tenants.get(tenant)).id)

    columns = ("id", "prefix", "scopes", "name", "created_at", "expires_at", "revoked_at")
    show_table(columns, (_row(record) for record in operate(ask, work, local=local)))


def _row(record: KeyRecord | ApiKey) -> Sequence[object]:
    times = (moment(record.created_at), moment(record.expires_at), moment(record.revoked_at))
    return (record.id, record.prefix, ",".join(sorted(record.scopes)), record.name, *times)


@app.command()
def revoke(key_id: str, tenant: Tenant, local: Local = False) -> None:
    """Revoke a key. Running servers forget it within TENORA_KEY_CACHE_SECONDS."""

    async def work(registry: Registry) -> KeyRecord:
        return await registry.keys.revoke((await registry.tenants.get(tenant)).id, key_id)

    revoked = operate(lambda client: client.admin.keys.revoke(tenant, key_id), work, local=local)
    typer.echo(f"{revoked.id} is revoked.")
