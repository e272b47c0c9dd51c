"""Where an adapter begins by explained variance: EVA (Paischer et al. 2024, arXiv:2410.07170).

A of a module becomes the directions in which the module's inputs differ most over the first rows, at the places that
something is learned from; B is zero, so the adapter begins as the base. The ranks of all modules together stay what
they are, and go to the directions that explain most; each module keeps one. The scaling of all modules stays equal.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tenora.model.decoder import Decoder
from tenora.model.projection import Projection
from tenora.training.arena import TrainedAdapter
from tenora.training.packing import PackedRows
from tenora.training.step import Part, load_pass

CONVERGED = 0.99  # cosine of a direction with what it was before the last rows
MOST_PARTS = 32
_SEED = 42
_ITERATIONS = 4


class Directions:
    """Principal directions of vectors that come in pieces (Ross et al. 2008).

    Attributes:
        most: k, how many there are at most.
        components: [≤ k, n], orthonormal, the largest variance first.
        converged: bool [≤ k], whether the last piece has hardly changed them.
    """

    def __init__(self, features: int, count: int) -> None:
        self.components = torch.zeros(0, features)
        self.converged = torch.zeros(0, dtype=torch.bool)
        self.most = count
        self._values = torch.zeros(0)
        self._mean = torch.zeros(features, dtype=torch.float64)
        self._seen = 0
        self._total = 0.0  # squared distances of all vectors from their mean
        self._waiting: list[Tensor] = []  # too few to be a piece

    @property
    def ratios(self) -> Tensor:
        """float64 [≤ k]: which share of all variance each direction explains."""
        return self._values.double().square() / max(self._total, torch.finfo(torch.float64).tiny)

    def settled(self, count: int) -> bool:
        """Whether so many of them have converged: then no more vectors are needed."""
        return len(self.converged) >= count and bool(self.converged[:count].all())

    def add(self, vectors: Tensor, *, last: bool = False) -> None:
        """Take vectors [m, n] in; fewer than k wait for more, if they are not the last."""
        self._waiting.append(vectors.float())
        if sum(map(len, self._waiting)) < self.most and not last:
            return
        piece = torch.cat(self._waiting)
        self._waiting = []
        if len(piece):
            self._take(piece)

    def _take(self, piece: Tensor) -> None:
        mean, before, seen = piece.double().mean(0), self._mean, self._seen
        centred = piece - mean.float()
        shift = math.sqrt(seen * len(piece) / (seen + len(piece)))
        between = shift * (before - mean) if seen else torch.zeros_like(mean)
        self._total += float(centred.double().square().sum() + between.square().sum())
        self._mean = (before * seen + mean * len(piece)) / (seen + len(piece))
        self._seen = seen + len(piece)
        stacked = [self._values[:, None] * self.components, centred, between[None]] if seen else [centred]
        old = self.components
        self._values, self.components = _leading(torch.cat(stacked), self.most)
        self.converged = torch.zeros(len(self.components), dtype=torch.bool)
        both = min(len(old), len(self.components))
        # A direction has no sign.
        self.converged[:both] = (old[:both] * self.components[:both]).sum(1).abs() >= CONVERGED


def _leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest singular values [≤ count] and right singular vectors [≤ count, n] (Halko et al. 2011)."""
    wanted = 2 * count
    if min(matrix.shape) <= wanted:
        _, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(_SEED)
            _, values, vectors = torch.svd_lowrank(matrix, q=wanted, niter=_ITERATIONS)
        right = vectors.mT
    return values[:count], right[:count].contiguous()


def begin_by_variance(
    decoder: Decoder, adapter: TrainedAdapter, parts: Iterator[PackedRows]
) -> Generator[None, None, tuple[list[int], dict[int, Tensor]]]:
    """Look at the inputs of an adapter's modules until their directions have converged, yielding between layers.

    Args:
        decoder: the base; what passes through it has no adapter.
        adapter: its ranks are the budget; it is not changed.
        parts: rows in the order in which they are learned; at most MOST_PARTS are taken.

    Returns:
        The new ranks, per row of the base, and A [rank, in] of each row.
    """
    ranks = adapter.ranks
    sites = [_sites(layer, ranks) for layer in decoder.layers]
    found = {
        projection: Directions(projection.site.in_features, _most(adapter, projection))
        for layer in sites
        for projection in layer
    }
    rows = {
        row: found[projection] for layer in sites for projection in layer for row in _rows(projection) if ranks[row]
    }
    budget = sum(ranks[row] for row in rows)
    needed = {projection: directions.most for projection, directions in found.items()}
    for number, part in enumerate(parts, start=1):
        batch = load_pass(decoder, [Part(part)])
        hidden = decoder.embed(batch.input_ids)
        for layer, projections in zip(decoder.layers, sites, strict=True):
            with _inputs([each for each in projections if not found[each].settled(needed[each])]) as inputs:
                hidden = layer(hidden, batch.context)
            for projection, seen in inputs.items():
                found[projection].add(seen[batch.predict_at].to("cpu"), last=number == MOST_PARTS)
            yield
        new = redistributed({row: directions.ratios for row, directions in rows.items()}, budget)
        needed = {each: max(new.get(row, 0) for row in _rows(each)) for each in found}
        if number == MOST_PARTS or all(directions.settled(needed[each]) for each, directions in found.items()):
            break
    return (
        [new.get(row, rank) for row, rank in enumerate(ranks)],
        {row: rows[row].components[:rank] for row, rank in new.items()},
    )


def redistributed(ratios: Mapping[int, Tensor], budget: int) -> dict[int, int]:
    """How many directions each row gets of a budget: its first one, and then those that explain most of all."""
    ranked = sorted(
        (-float(ratio), row, index) for row, found in ratios.items() for index, ratio in enumerate(found[1:].tolist())
    )
    counts = dict.fromkeys(ratios, 1)
    for _, row, _ in ranked[: max(budget - len(ratios), 0)]:
        counts[row] += 1
    return counts


def _sites(layer: nn.Module, ranks: Sequence[int]) -> list[Projection]:
    """The products of a layer that the adapter has modules at."""
    return [
        module
        for module in layer.modules()
        if isinstance(module, Projection) and any(ranks[row] for row in _rows(module))
    ]


def _rows(projection: Projection) -> range:
    return range(projection.site.row, projection.site.row + len(projection.site.slices))


def _most(adapter: TrainedAdapter, projection: Projection) -> int:
    """The most directions that one of the site's modules may get."""
    largest = max(adapter.ranks[row] for row in _rows(projection))
    return min(round(largest * adapter.lora.eva_rho), projection.site.in_features)


@contextmanager
def _inputs(projections: Sequence[Projection]) -> Iterator[dict[Projection, Tensor]]:
    """What each of them is given meanwhile, [T, in]."""
    seen: dict[Projection, Tensor] = {}

    def keep(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        if isinstance(module, Projection):
            seen[module] = given[0]

    handles = [projection.register_forward_pre_hook(keep) for projection in projections]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
