"""What `/v1/models` lists: the base, the tenant's adapters by name, and its jobs' results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tenora.control.adapters import rows
from tenora.control.adapters.adapters import Adapters
from tenora.control.adapters.records import ModelCard
from tenora.control.adapters.resolution import find_digest, split_canonical
from tenora.control.registry.database import Database
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
        async with self.database.read() as session:
            pairs = await rows.all_versions(session, principal.tenant_id)
        names = [(alias.name, row.created_at) for alias, row in pairs if row.version == alias.version]
        results = [(row.model_name, row.created_at) for _, row in pairs if row.model_name is not None]
        return [self._base(), *(self._card(principal, name, created) for name, created in names + results)]

    async def get(self, principal: Principal, name: str) -> ModelCard:
        """The card of anything that may stand in a request's `model`; ModelNotFoundError otherwise."""
        if name == self.base_id:
            return self._base()
        async with self.database.read() as session:
            digest = await find_digest(session, principal, name)
            created = None if digest is None else await rows.created_at(session, principal.tenant_id, digest)
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
