"""What `/v1/models` lists: the base, the tenant's adapters by name, and its jobs' results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import select

from tenora.control.adapters.adapters import Adapters
from tenora.control.adapters.records import ModelCard
from tenora.control.adapters.resolution import all_versions, find_digest, pairs, split_canonical
from tenora.control.registry.database import Database
from tenora.control.registry.tables import AdapterRow, AdapterVersionRow
from tenora.control.tenancy.records import Principal
from tenora.errors import ModelNotFoundError, NotFoundError, PermissionDeniedError

if TYPE_CHECKING:
    from tenora.engine.client.client import AsyncEngine

OWNER = "tenora"


@dataclass(slots=True)
class Models:
    """The models that a tenant may call.

    Attributes:
        base_id: the base model's id.
        base_created: Unix time shown for the base.
    """

    database: Database
    adapters: Adapters
    engine: AsyncEngine
    base_id: str
    base_created: int

    async def list(self, principal: Principal) -> Sequence[ModelCard]:
        """The base first, then every adapter under its name and every job's result under its `ft:` name."""
        query = all_versions(principal.tenant_id).order_by(AdapterRow.name, AdapterVersionRow.version.desc())
        async with self.database.read() as session:
            rows = await pairs(session, query)
        names = [(alias.name, row.created_at) for alias, row in rows if row.version == alias.version]
        results = [(row.model_name, row.created_at) for _, row in rows if row.model_name is not None]
        return [self._base(), *(self._card(principal, name, created) for name, created in names + results)]

    async def get(self, principal: Principal, name: str) -> ModelCard:
        """The card of anything that may stand in a request's `model`; ModelNotFoundError otherwise."""
        if name == self.base_id:
            return self._base()
        async with self.database.read() as session:
            digest = await find_digest(session, principal, name)
            created = await session.scalar(
                select(AdapterVersionRow.created_at)
                .where(AdapterVersionRow.tenant_id == principal.tenant_id, AdapterVersionRow.digest == digest)
                .limit(1)
            )
        if digest is None:
            raise ModelNotFoundError(name)
        return self._card(principal, name, created or self.base_created)

    async def delete(self, principal: Principal, name: str) -> None:
        """Delete an adapter by its name or `tenant/name`, or one version by its `ft:` name.

        Raises:
            PermissionDeniedError: the base, which nobody may delete.
            ConflictError: the version is the one that its adapter's name points at, and there are others.
        """
        if name == self.base_id:
            raise PermissionDeniedError(
                "The base model cannot be deleted; delete adapters instead.", code="base_model", param="model"
            )
        try:
            if name.startswith("ft:"):
                await self.adapters.delete_result(principal, name)
            else:
                await self.adapters.delete(principal, name)
        except NotFoundError as error:
            raise ModelNotFoundError(name) from error

    def _base(self) -> ModelCard:
        return ModelCard(
            id=self.base_id,
            created=self.base_created,
            owned_by=OWNER,
            root=self.base_id,
            parent=None,
            max_model_len=self.engine.ready.max_model_len,
        )

    def _card(self, principal: Principal, name: str, created: int) -> ModelCard:
        return ModelCard(
            id=name,
            created=created,
            owned_by=principal.tenant,
            root=name if name.startswith("ft:") else split_canonical(principal, name.partition("@")[0]) or name,
            parent=self.base_id,
            max_model_len=self.engine.ready.max_model_len,
        )
