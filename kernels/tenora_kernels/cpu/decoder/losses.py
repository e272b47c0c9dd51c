"""Losses of the learned rows of a training stream and the gradient of its hidden states: `loss` as a few calls."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import torch
from torch import Tensor

from tenora_kernels.cpu.decoder.loss import (
    BLOCK_PANELS,
    LOSS,
    finish_job,
    gather_job,
    gradient_job,
    loss_job,
    score_job,
)
from tenora_kernels.cpu.decoder.stack import PackedStack
from tenora_kernels.cpu.products.gemm import BF16_PANELS, FLOAT32_PANELS, PANEL
from tenora_kernels.cpu.runtime.arguments import arguments
from tenora_kernels.cpu.runtime.workspace import cut

__all__ = ["StreamLosses", "warm_up"]

_SCORE_BYTES = 48 * 2**20  # of scores alive at once; 256 rows of a vocabulary of 49,152
_PRODUCTS = 2e9  # multiply-adds between two yields: about 20 ms on two cores


class StreamLosses:
    """The head over the rows of hidden states that predict a target.

    Args:
        stack: the decoder.
        hidden: float32 [T, hidden], the last layer's output, before the final norm.
        predict_at: int64 [n], rows of `hidden`; a row may occur more than once.
        targets: int64 [n].
    """

    def __init__(self, stack: PackedStack, hidden: Tensor, predict_at: Tensor, targets: Tensor) -> None:
        self._stack = stack
        self._hidden = hidden.contiguous()
        self._at, self._targets = predict_at.contiguous(), targets.contiguous()
        limit = max(16, _SCORE_BYTES // (4 * stack.head.padded))
        pieces = max(1, -(-len(targets) // limit))
        self._bounds = [len(targets) * piece // pieces for piece in range(pieces + 1)]

    def run(self, coefficients: Tensor | None) -> Generator[None, None, tuple[Tensor, Tensor, Tensor | None]]:
        """Go over the rows, yielding now and then.

        Args:
            coefficients: float32 [n]; None if nobody wants a gradient.

        Returns:
            Loss float32 [n] in nats; bool [n], whether no score is above the target's; the gradient of
            Σ coefficient · loss, float32 [T, hidden], or None.
        """
        count = len(self._targets)
        losses, right = torch.empty(count), torch.empty(count, dtype=torch.int64)
        d_hidden = None if coefficients is None else torch.zeros_like(self._hidden)
        for start, stop in zip(self._bounds, self._bounds[1:], strict=False):
            if start < stop:
                yield from self._piece(slice(start, stop), losses, right, coefficients, d_hidden)
        return losses, right.bool(), d_hidden

    def _piece(
        self, span: slice, losses: Tensor, right: Tensor, coefficients: Tensor | None, d_hidden: Tensor | None
    ) -> Generator[None, None, None]:
        stack, head = self._stack, self._stack.head
        rows, depth, panels = span.stop - span.start, head.in_features, len(head.panels)
        blocks = -(-panels // BLOCK_PANELS)
        sizes = {
            "normed": rows * depth, "scores": rows * head.padded, "parts": 2 * rows * blocks, "target_scores": rows,
            "log_sums": rows, "d_normed": rows * depth, "transposed": 2 * BLOCK_PANELS * PANEL * depth,
        }  # fmt: skip
        block, places = cut(sizes, stack.workspace.take)
        given = None if coefficients is None else coefficients[span].float().contiguous()
        call = arguments(
            LOSS, **places, rows=rows, vocabulary=head.out_features, panels=panels, hidden_size=depth,
            weight=head.panels.data_ptr(), hidden=self._hidden.data_ptr(), norm=stack.final_norm.data_ptr(),
            at=self._at[span].data_ptr(), targets=self._targets[span].data_ptr(), loss=losses[span].data_ptr(),
            right=right[span].data_ptr(), coefficients=0 if given is None else given.data_ptr(),
            d_hidden=0 if d_hidden is None else d_hidden.data_ptr(),
        )  # fmt: skip
        sample, eps, team = BF16_PANELS if head.is_bf16 else FLOAT32_PANELS, np.float32(stack.eps), stack.team
        step = max(1, int(_PRODUCTS / (rows * depth * BLOCK_PANELS * PANEL)))
        try:
            team.run(gather_job, 1, call, eps)
            for first in range(0, blocks, step):
                team.run(score_job, 1, call, first, min(blocks, first + step), sample)
                yield
            team.run(loss_job, 1, call, blocks)
            if given is None or d_hidden is None:
                return
            for first in range(0, blocks, step):
                last = min(blocks, first + step)
                team.run(gradient_job, last - first + 1, call, first, last, sample)
                yield
            team.run(finish_job, 1, call, eps)
        finally:
            stack.workspace.give(block)


def warm_up(stack: PackedStack) -> None:
    """Compile every job, or read the compiled code from the cache on disk."""
    hidden, first = torch.zeros(1, stack.head.in_features), torch.zeros(1, dtype=torch.int64)
    for _ in StreamLosses(stack, hidden, first, first).run(torch.ones(1)):
        pass
