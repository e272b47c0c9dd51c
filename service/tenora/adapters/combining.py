"""The weights of a composition, made of those of its parts (`tenora.adapters.composition` says what each means).

Everything is computed in float32, as peft does, but what needs no computing: pieces that are scaled alike keep their
bits, in the type that they were stored in, and the scaling says the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tenora.adapters.composition import ELECTING, PRUNING, require_composable
from tenora.adapters.ref import AdapterRef, Composition
from tenora.adapters.safetensors_file import as_float32
from tenora.adapters.targets import TargetModule
from tenora.adapters.weights import AdapterWeights, LoraModule
from tenora.errors import CompositionError

Float32Array = npt.NDArray[np.float32]
Merge = Callable[[list[Float32Array], list[float]], Float32Array]
"""Of arrays of one shape, and their weights, one."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """What one part has of a module, and what its B·A is multiplied with: weight times scaling."""

    module: LoraModule
    factor: float

    @property
    def a(self) -> Float32Array:
        """[r, in] in float32."""
        return as_float32(self.module.a)

    @property
    def b(self) -> Float32Array:
        """[out, r] in float32."""
        return as_float32(self.module.b)


def combine(
    ref: AdapterRef, parts: Sequence[AdapterWeights], targets: Sequence[TargetModule], *, max_rank: int
) -> AdapterWeights:
    """The weights of a composition.

    Args:
        ref: has a composition; its digest seeds what is drawn by chance.
        parts: the weights of its parts, in their order.
        targets: the modules of the base.
        max_rank: of all parts together.

    Raises:
        CompositionError: the parts do not go together.
    """
    composition = ref.composition
    if composition is None:
        raise ValueError("the reference names one version, not a composition.")
    require_composable([part.rank for part in parts], composition.combination, max_rank=max_rank)
    if any(part.invocation or part.parts or part.flags or part.heads for part in parts):
        raise CompositionError(
            "Only low-rank adapters that act on every token are composed or scaled, and one of these has more: an "
            "invocation, heads, a bottleneck, a prefix or scales of outputs. Call it by itself.",
            param="adapters",
        )
    combined = _combined(composition, int(ref.digest[:15], 16), max(part.rank for part in parts))
    weights = [part.weight for part in composition.parts]
    modules: dict[str, LoraModule] = {}
    for target in targets:
        pieces = [
            _Piece(module, weight * module.scaling)
            for part, weight in zip(parts, weights, strict=True)
            if (module := part.modules.get(target.path)) is not None
        ]
        if pieces:
            modules[target.path] = combined(pieces)
    return AdapterWeights(
        modules=modules,
        rank=max(module.rank for module in modules.values()),
        target_modules=tuple(dict.fromkeys(target.name for target in targets if target.path in modules)),
        config={},
        nbytes=sum(module.a.nbytes + module.b.nbytes for module in modules.values()),
    )


def _combined(composition: Composition, seed: int, rank: int) -> Callable[[Sequence[_Piece]], LoraModule]:
    """What makes one module of its pieces."""
    if composition.combination == "cat":
        return _cat
    if composition.combination == "svd":
        return lambda pieces: _svd(pieces, rank)
    merge = _merge_of(composition, torch.Generator().manual_seed(seed))
    return lambda pieces: _merged(pieces, merge)


def _cat(pieces: Sequence[_Piece]) -> LoraModule:
    """The pieces one below the other: their products are summed by the multiplication itself."""
    first = pieces[0]
    alike = all((piece.factor, piece.module.dtype) == (first.factor, first.module.dtype) for piece in pieces)
    if alike:
        a, bs = [piece.module.a for piece in pieces], [piece.module.b for piece in pieces]
        return _module(pieces, np.concatenate(a), np.concatenate(bs, axis=1), first.factor, first.module.dtype)
    scaled = [piece.a * np.float32(piece.factor) for piece in pieces]
    return _module(pieces, np.concatenate(scaled), np.concatenate([piece.b for piece in pieces], axis=1))


def _svd(pieces: Sequence[_Piece], rank: int) -> LoraModule:
    """Σ factor·B·A cut to `rank` (Eckart and Young 1936).

    The sum has no higher rank than its pieces together, so a decomposition of that size is enough: of R_b·R_aᵀ, where
    B = Q_b·R_b and Aᵀ = Q_a·R_a are the pieces side by side.
    """
    b = np.concatenate([piece.b * np.float64(piece.factor) for piece in pieces], axis=1)
    a = np.concatenate([piece.a.astype(np.float64) for piece in pieces])
    q_b, r_b = np.linalg.qr(b)
    q_a, r_a = np.linalg.qr(a.T)
    u, s, vt = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = np.sqrt(s[:rank])  # on either side, or one of them might overflow a narrow type
    return _module(
        pieces,
        (root[:, None] * (vt[:rank] @ q_a.T)).astype(np.float32),
        ((q_b @ u[:, :rank]) * root).astype(np.float32),
    )


def _merged(pieces: Sequence[_Piece], merge: Merge) -> LoraModule:
    """A and B merged by themselves, with the root of the factor on either side; a negative one's sign goes to A."""
    ranks = {piece.module.rank for piece in pieces}
    if len(ranks) > 1:
        raise CompositionError(
            f"The adapters have ranks {', '.join(map(str, sorted(ranks)))} at {pieces[0].module.path}, and this "
            'combination needs one; use combination "cat" or "svd".',
            param="combination",
        )
    roots = [math.sqrt(abs(piece.factor)) for piece in pieces]
    signed = [math.copysign(root, piece.factor) for root, piece in zip(roots, pieces, strict=True)]
    a = merge([piece.a for piece in pieces], signed)
    return _module(pieces, a, merge([piece.b for piece in pieces], roots))


def _module(
    pieces: Sequence[_Piece],
    a: npt.NDArray[np.generic],
    b: npt.NDArray[np.generic],
    scaling: float = 1.0,
    dtype: str = "float32",
) -> LoraModule:
    return LoraModule(pieces[0].module.path, a.shape[0], scaling, a, b, dtype)


def _weighted(arrays: list[Float32Array], weights: list[float]) -> Float32Array:
    """[n, …], each multiplied with its weight."""
    return np.stack([array * np.float32(weight) for array, weight in zip(arrays, weights, strict=True)])


def _sum(arrays: list[Float32Array], weights: list[float]) -> Float32Array:
    """Task arithmetic (Ilharco et al. 2023)."""
    total: Float32Array = _weighted(arrays, weights).sum(axis=0)
    return total


def _disjoint(arrays: list[Float32Array], weights: list[float], *, by_count: bool) -> Float32Array:
    """The weighted mean of the entries that have the sign of most of them: by their sum, or by their number."""
    stacked = np.stack(arrays)
    signs = np.sign(stacked)
    majority = np.where((signs if by_count else stacked).sum(axis=0) >= 0, np.float32(1), np.float32(-1))
    agree = signs == majority
    total = (_weighted(arrays, weights) * agree).sum(axis=0)
    mean: Float32Array = total / np.maximum(agree.sum(axis=0), 1).astype(np.float32)
    return mean


def _largest(array: Float32Array, density: float) -> Float32Array:
    """The entries of the largest magnitude, as many as the density says; the others are 0."""
    kept = int(density * array.size)
    if density >= 1:
        return array
    flat = array.reshape(-1)
    found = np.zeros_like(flat)
    if kept:
        places = np.argpartition(-np.abs(flat), kept - 1)[:kept]
        found[places] = flat[places]
    return found.reshape(array.shape)


def _drawn(array: Float32Array, density: float, generator: torch.Generator) -> Float32Array:
    """Each entry with the probability `density`, scaled up to keep the mean."""
    if density >= 1:
        return array
    mask = torch.bernoulli(torch.full(array.shape, density), generator=generator).numpy()
    kept: Float32Array = array * mask / np.float32(density)
    return kept


def _merge_of(composition: Composition, generator: torch.Generator) -> Merge:
    """What a combination makes of arrays of one shape: some of each one's entries, and then one of all."""
    density = composition.density

    def kept(array: Float32Array) -> Float32Array:
        if composition.combination == "ties":
            return _largest(array, density)
        return _drawn(array, density, generator) if composition.combination in PRUNING else array

    def merge(arrays: list[Float32Array], weights: list[float]) -> Float32Array:
        left = [kept(array) for array in arrays]
        if composition.combination in ELECTING:
            return _disjoint(left, weights, by_count=composition.majority_sign_method == "frequency")
        return _sum(left, weights)

    return merge
