"""What the base makes of a row, as numbers: of each of its last layers the state of the last token, and the mean."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tenora.model.decoder import Decoder
from tenora.model.readouts.base import Read, Readout, ReadPositions


@dataclass(frozen=True, slots=True)
class Features:
    """`ReadoutKind` of rows that are read once.

    Attributes:
        wanted: a layer, -1 for the last one after the final norm, -2 for the one below it; and "last" or "mean".
    """

    wanted: tuple[tuple[int, str], ...]

    def over(self, decoder: Decoder, where: ReadPositions, /) -> Readout:
        """See `ReadoutKind`."""
        return FeatureReadout(decoder, self, where)


@dataclass(frozen=True, slots=True)
class FeatureReadout:
    """The scores of a row are its features, side by side in the order of `Features.wanted`: float32 [n, wanted · H]."""

    decoder: Decoder
    kind: Features
    where: ReadPositions
    _seen: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def see(self, layer: int, hidden: Tensor, predict_at: Tensor) -> None:
        """See `Readout`."""
        for wanted in self.kind.wanted:
            if wanted[0] == layer:
                self._seen[wanted] = self._pooled(hidden, predict_at, wanted[1])

    def read(
        self, hidden: Tensor, predict_at: Tensor, targets: Tensor, coefficients: Tensor | None
    ) -> Generator[None, None, Read]:
        """See `Readout`; there is no loss and no gradient."""
        if coefficients is not None:
            raise ValueError("features are not learned.")
        if any(layer == -1 for layer, _ in self.kind.wanted):
            self.see(-1, self.decoder.finish(hidden), predict_at)
        yield
        nothing = torch.zeros(len(targets), device=hidden.device)
        found = torch.cat([self._seen.pop(wanted) for wanted in self.kind.wanted], dim=1)
        return Read(nothing, nothing.bool(), None, found)

    def _pooled(self, states: Tensor, read_at: Tensor, pooling: str) -> Tensor:
        """Of states [T, H] what is read of each row, float32 [n, H]; indexing copies."""
        if pooling == "last":
            return states[read_at].float()
        starts = torch.from_numpy(self.where.starts).to(states.device)
        counts = read_at - starts + 1
        row = torch.repeat_interleave(torch.arange(len(read_at), device=states.device), counts)
        within = torch.arange(len(row), device=states.device) - (counts.cumsum(0) - counts)[row]
        sums = torch.zeros(len(read_at), states.shape[1], device=states.device)
        return sums.index_add(0, row, states[starts[row] + within].float()) / counts[:, None]
