"""The difference between a full fine-tuning and its base as low-rank terms, with one budget of ranks for all matrices.

Of a matrix' difference UΣVᵀ the largest singular values are kept, and which ones is decided over all matrices at once
(Eckart and Young 1936: of that many terms none leave a smaller rest in the Frobenius norm): a matrix that has changed
in many directions gets many of them. A = Σ^½Vᵀ, B = UΣ^½.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Factors:
    """The largest terms of one difference.

    Attributes:
        u: [out, k]; s: [k], descending; vt: [k, in].
    """

    u: Tensor
    s: Tensor
    vt: Tensor

    @classmethod
    def of(cls, difference: Tensor, most: int) -> Factors:
        """Of a matrix [out, in] at most so many terms."""
        u, s, vt = torch.linalg.svd(difference.float(), full_matrices=False)
        return cls(u[:, :most].contiguous(), s[:most].contiguous(), vt[:most].contiguous())

    def product(self, rank: int) -> Tensor:
        """The sum of the first `rank` terms, [out, in]."""
        return (self.u[:, :rank] * self.s[:rank]) @ self.vt[:rank]

    def pair(self, rank: int) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank], whose product B · A is the sum of the first `rank` terms."""
        root = self.s[:rank].sqrt()
        return root[:, None] * self.vt[:rank], self.u[:, :rank] * root

    def weights(self, rank: int) -> int:
        """Numbers in such a pair."""
        return rank * (self.u.shape[0] + self.vt.shape[1])


def share_ranks(factors: Mapping[str, Factors], mean: int) -> dict[str, int]:
    """The rank of each matrix if they have `mean` on the average: the largest singular values first, at least one."""
    spectra: Sequence[Tensor] = [one.s for one in factors.values()]
    every = torch.cat(list(spectra))
    budget = min(mean * len(factors), len(every))
    of_matrix = torch.repeat_interleave(torch.arange(len(spectra)), torch.tensor([len(one) for one in spectra]))
    chosen = of_matrix[every.cpu().topk(budget).indices]
    counts = torch.bincount(chosen, minlength=len(spectra)).clamp(min=1).tolist()
    return dict(zip(factors, counts, strict=True))
