"""What the names of a request mean for a tenant, in immutable versions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tenora.adapters.composition import compose, require_composable, require_kinds
from tenora.adapters.ref import AdapterRef, Part
from tenora.control.adapters.blobs import Blobs
from tenora.control.adapters.records import Target, WeightedVersion
from tenora.control.adapters.resolution import find_digest
from tenora.control.inference.records import AskedComposition
from tenora.control.registry.database import Database
from tenora.control.tenancy.records import Principal
from tenora.errors import CompositionError, InvalidRequestError, ModelNotFoundError, NotFoundError

_LONGEST_MODEL_NAME = 600
_Weighted = Sequence[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class Names:
    """Finds what is asked for. `base_id` always means the base."""

    database: Database
    blobs: Blobs
    base_id: str

    async def resolve(
        self, principal: Principal, model: str | None, adapter_id: str | None, composition: AskedComposition | None
    ) -> Target:
        """What a request names, now; never a silent fall-back to the base.

        Raises:
            ModelNotFoundError: no such model for this tenant; the same for another tenant's.
            InvalidRequestError: nothing is named, or two things.
            CompositionError: the adapters do not go together.
        """
        if composition is not None and composition.adapters:
            shown, wanted = self._several(model, composition.adapters)
        else:
            shown, name = self._one(model, adapter_id)
            wanted = [] if name == self.base_id else [(name, 1.0)]
            if not wanted and composition is not None:
                raise InvalidRequestError(
                    "adapter_scale scales an adapter, and the base is asked for. Name an adapter, or leave it out.",
                    param="adapter_scale",
                )
        versions = await self._find(principal, [name for name, _ in wanted])
        adapter = versions[0] if versions else None
        composed: Sequence[WeightedVersion] = ()
        if composition is not None:
            adapter = await self._composed(wanted, versions, composition)
            composed = [
                WeightedVersion(name, version.digest, weight * composition.scale)
                for (name, weight), version in zip(wanted, versions, strict=True)
            ]
        return Target(
            name=shown,
            adapter=adapter,
            tenant_id=principal.tenant_id,
            # The server's choice and secret from nobody, but no client can send another: hits never cross tenants.
            cache_salt=principal.tenant_id,
            composed=composed,
        )

    def _one(self, model: str | None, adapter_id: str | None) -> tuple[str, str]:
        """The name that is echoed, and the one that is meant."""
        if adapter_id is not None and model not in {None, self.base_id}:
            raise InvalidRequestError(
                f"With adapter_id, model must be the base {self.base_id!r} or absent; name the adapter in one of them.",
                param="adapter_id",
            )
        wanted = model if adapter_id is None else adapter_id
        if wanted is None:
            raise InvalidRequestError(
                f"model is missing or null. Send an adapter's name, or {self.base_id!r} for the base; GET /v1/models "
                "lists them. A job's fine_tuned_model is null until it has succeeded.",
                code="missing_required_parameter",
                param="model",
            )
        return wanted if model is None else model, wanted

    def _several(self, model: str | None, adapters: _Weighted) -> tuple[str, _Weighted]:
        """The name that is echoed, and the adapters that are meant."""
        names = [name for name, _ in adapters]
        if model not in {None, self.base_id, *names}:
            raise InvalidRequestError(
                f"With adapters, model must be the base {self.base_id!r}, one of the adapters, or absent.",
                param="model",
            )
        if self.base_id in names:
            raise InvalidRequestError(
                f"adapters names the base {self.base_id!r}, which is no adapter. Leave it out.", param="adapters"
            )
        return "+".join(names) if model is None else model, adapters

    async def _find(self, principal: Principal, names: Sequence[str]) -> list[AdapterRef]:
        """The versions that these mean at one moment."""
        if any(len(name) > _LONGEST_MODEL_NAME for name in names):
            raise InvalidRequestError(f"A model's name has at most {_LONGEST_MODEL_NAME} characters.", param="model")
        if not names:
            return []
        async with self.database.read() as session:
            digests = [await find_digest(session, principal, name) for name in names]
        found: list[AdapterRef] = []
        for name, digest in zip(names, digests, strict=True):
            if digest is None:
                raise ModelNotFoundError(name)
            try:
                found.append(self.blobs.store.ref(digest))
            except NotFoundError as error:
                raise ModelNotFoundError(name) from error  # deleted since the row was read
        return found

    async def _composed(
        self, wanted: _Weighted, versions: Sequence[AdapterRef], asked: AskedComposition
    ) -> AdapterRef | None:
        parts = [
            Part(version.digest, version.path, weight) for version, (_, weight) in zip(versions, wanted, strict=True)
        ]
        if len({part.digest for part in parts}) < len(parts):
            raise CompositionError(
                "adapters has one version twice. Name it once, with the sum of its weights.", param="adapters"
            )
        found = compose(
            parts,
            asked.combination,
            density=asked.density,
            majority_sign_method=asked.majority_sign_method,
            scale=asked.scale,
        )
        if found is None or found.composition is None:
            return found
        names = {part.digest: name for part, (name, _) in zip(parts, wanted, strict=True)}
        # What cannot be read is told by the engine, which reads all of it.
        shapes = {digest: shape for digest in found.versions if (shape := await self.blobs.shape(digest)) is not None}
        require_kinds({names[digest]: shape.kind for digest, shape in shapes.items()})
        ranks = [shape.highest_rank for shape in shapes.values()]
        require_composable(ranks, found.composition.combination, max_rank=self.blobs.max_rank)
        return found
