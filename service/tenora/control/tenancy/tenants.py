"""Tenants: who owns files, jobs, adapters and keys."""

from __future__ import annotations

from collections.abc import Sequence

from tenora.control.registry.database import Database, RowExistsError
from tenora.control.registry.ids import check_tenant_name, new_id, unix_now
from tenora.control.registry.tables import TenantRow
from tenora.control.tenancy.records import LEAST_WEIGHT, MOST_WEIGHT, TenantRecord
from tenora.control.tenancy.rows import all_tenants, find_tenant
from tenora.errors import ConflictError, InvalidRequestError, NotFoundError

DEFAULT_TENANT = "default"


class Tenants:
    """The tenants of this service. For the operator: nothing here is reachable with another tenant's key."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, name: str) -> TenantRecord:
        """Add a tenant. ConflictError if the name is taken, InvalidRequestError if it does not match the pattern."""
        row = TenantRow(id=new_id("tenant"), name=check_tenant_name(name), created_at=unix_now(), weight=1.0)
        try:
            async with self._database.write() as session:
                session.add(row)
        except RowExistsError as error:
            raise ConflictError(f"There is a tenant {name!r} already; choose another name.", param="name") from error
        return _record(row)

    async def get(self, name: str) -> TenantRecord:
        """The tenant of that name, or NotFoundError."""
        async with self._database.read() as session:
            return _record(_found(await find_tenant(session, name), name))

    async def set_weight(self, name: str, weight: float) -> TenantRecord:
        """Give a tenant another share of the workers; it counts from the next claim on. Usual is 1.

        Raises:
            NotFoundError: there is none of that name.
            InvalidRequestError: `weight` is not from LEAST_WEIGHT to MOST_WEIGHT.
        """
        if not LEAST_WEIGHT <= weight <= MOST_WEIGHT:
            raise InvalidRequestError(
                f"weight must be a number from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}.", param="weight"
            )
        async with self._database.write() as session:
            row = _found(await find_tenant(session, name, writes=True), name)
            row.weight = weight
        return _record(row)

    async def list(self) -> Sequence[TenantRecord]:
        """Every tenant, by name."""
        async with self._database.read() as session:
            return [_record(row) for row in await all_tenants(session)]

    async def ensure(self, name: str) -> TenantRecord:
        """The tenant of that name, created if need be."""
        try:
            return await self.get(name)
        except NotFoundError:
            return await self.create(name)


def _found(row: TenantRow | None, name: str) -> TenantRow:
    if row is None:
        raise NotFoundError(f"There is no tenant {name!r}; `tenora tenants list` shows them.", param="tenant")
    return row


def _record(row: TenantRow) -> TenantRecord:
    return TenantRecord(id=row.id, name=row.name, created_at=row.created_at, weight=row.weight)
