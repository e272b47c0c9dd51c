"""The immutable identity of an adapter version, or of several that act as one. Free of torch."""

from __future__ import annotations

from typing import Literal

import msgspec

Combination = Literal["cat", "linear", "ties", "dare_linear", "dare_ties", "svd"]
MajoritySign = Literal["total", "frequency"]


class Part(msgspec.Struct, frozen=True):
    """One adapter version of a composition: as of `AdapterRef`, and what its delta weights are multiplied with."""

    digest: str
    path: str
    weight: float


class Composition(msgspec.Struct, frozen=True):
    """Adapter versions that act as one (`tenora.adapters.composition`).

    Attributes:
        parts: at least one, no digest twice, in the order of their digests.
        density: share of the weights that is kept by a combination that prunes; else 1.
        majority_sign_method: how a combination that elects signs does it; else total.
    """

    parts: tuple[Part, ...]
    combination: Combination = "cat"
    density: float = 1.0
    majority_sign_method: MajoritySign = "total"


class AdapterRef(msgspec.Struct, frozen=True):
    """Names one immutable adapter version and where its PEFT files lie on this machine, or a composition of several.

    Attributes:
        digest: lowercase hex SHA-256 over the version's content; equal digest means equal bytes. Of a composition: over
            the digests of its parts, their weights, and how they are combined.
        path: directory with `adapter_config.json` and `adapter_model.safetensors`; empty of a composition.
    """

    digest: str
    path: str
    composition: Composition | None = None

    @property
    def versions(self) -> tuple[str, ...]:
        """The digests of what must be stored for it to be loaded."""
        return (self.digest,) if self.composition is None else tuple(part.digest for part in self.composition.parts)
