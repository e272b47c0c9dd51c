"""What objectives are made of: losses of tokens summed to rows, and what holds for a row given to its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from tenora.training.packing import PackedRows


def row_sums(part: PackedRows, losses: Tensor) -> Tensor:
    """The losses [n] of a part summed per row, float32 [rows of the part]."""
    sums = torch.zeros(len(part.rows), dtype=torch.float64, device=losses.device)
    return sums.index_add_(0, torch.from_numpy(part.target_row).to(losses.device), losses.double()).float()


def of_tokens(part: PackedRows, of_rows: Tensor) -> Tensor:
    """A number of each row [rows of the part] at each of its learned tokens [n]."""
    return of_rows[torch.from_numpy(part.target_row).to(of_rows.device)]
