"""Several adapters of one base as one: what may be composed, and the digest of what comes of it. Free of torch.

With delta weights c·B·A (c the scaling), of parts i with weights w:

    cat          Σ wᵢcᵢBᵢAᵢ exactly: ranks add up
    linear       (Σ √(wᵢcᵢ)·Bᵢ)(Σ √(wᵢcᵢ)·Aᵢ)
    ties         as linear, of the largest entries, where the parts agree on the sign (Yadav et al. 2023)
    dare_linear  as linear, of entries drawn by chance and scaled up (Yu et al. 2024)
    dare_ties    as ties, of those
    svd          the best approximation of cat by the highest rank of its parts

`tenora.adapters.combining` computes them, each as peft's `add_weighted_adapter` does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import msgspec

from tenora.adapters.kinds.table import COMPOSED
from tenora.adapters.ref import AdapterRef, Combination, Composition, MajoritySign, Part
from tenora.errors import CompositionError

MAX_PARTS = 8
LARGEST_WEIGHT = 10.0
LARGEST_SCALE = 2.0
DEFAULT_DENSITY = 0.5
OF_EQUAL_RANK: frozenset[Combination] = frozenset({"linear", "ties", "dare_linear", "dare_ties"})
PRUNING: frozenset[Combination] = frozenset({"ties", "dare_linear", "dare_ties"})
ELECTING: frozenset[Combination] = frozenset({"ties", "dare_ties"})


def compose(
    parts: Sequence[Part],
    combination: Combination = "cat",
    *,
    density: float = DEFAULT_DENSITY,
    majority_sign_method: MajoritySign = "total",
    scale: float = 1.0,
) -> AdapterRef | None:
    """Adapters that act as one; None if nothing of them is left, which is the base.

    Requests that mean the same get the same digest: the order of the parts does not matter, the scale is multiplied
    into the weights, and parts of no weight are left out, but where their signs count. One adapter of weight 1 is
    itself.

    Args:
        parts: with no digest twice.
        density, majority_sign_method: looked at by combinations that use them.
        scale: of all of it.
    """
    weighed = [msgspec.structs.replace(part, weight=part.weight * scale) for part in parts]
    if not any(part.weight for part in weighed):
        return None
    if combination not in ELECTING:
        weighed = [part for part in weighed if part.weight]
    if len(weighed) == 1:
        (only,) = weighed
        if only.weight == 1:
            return AdapterRef(only.digest, only.path)
        combination = "cat"
    found = Composition(
        parts=tuple(sorted(weighed, key=lambda part: part.digest)),
        combination=combination,
        density=density if combination in PRUNING else 1.0,
        majority_sign_method=majority_sign_method if combination in ELECTING else "total",
    )
    return AdapterRef(digest_of(found), "", found)


def digest_of(composition: Composition) -> str:
    """What names a composition: SHA-256 of its parts' digests and weights, and of how they are combined."""
    content = [
        *(composition.combination, composition.density, composition.majority_sign_method),
        *([part.digest, part.weight] for part in composition.parts),
    ]
    return hashlib.sha256(b"tenora composition 1\n" + msgspec.json.encode(content)).hexdigest()


def require_kinds(kinds: Mapping[str, str]) -> None:
    """Raise CompositionError unless adapters of these kinds can be combined, or scaled; by the names they are asked by.

    What an adapter is beside low-rank matrices (heads, bottlenecks, prefixes, scales of outputs) has no sum.
    """
    for name, kind in kinds.items():
        if kind not in COMPOSED:
            raise CompositionError(
                f"The adapter {name!r} is of kind {kind}, which is neither composed nor scaled; those of kind "
                f"{', '.join(sorted(COMPOSED))} are. Call it by itself.",
                param="adapters",
            )


def require_composable(ranks: Sequence[int], combination: Combination, *, max_rank: int) -> None:
    """Raise CompositionError unless adapters of these ranks, each its highest, can be combined so."""
    if sum(ranks) > max_rank:
        raise CompositionError(
            f"The adapters have ranks {', '.join(map(str, ranks))}, {sum(ranks)} together, and this server composes up "
            f"to {max_rank}; leave some out, or have the operator raise TENORA_MAX_LORA_RANK.",
            param="adapters",
        )
    if combination in OF_EQUAL_RANK and len(set(ranks)) > 1:
        raise CompositionError(
            f"{combination} needs adapters of one rank, and these have {', '.join(map(str, ranks))}; "
            'use combination "cat" or "svd".',
            param="combination",
        )
