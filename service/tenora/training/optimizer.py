"""AdamW on one adapter's stretch of the flat float32 arena (Loshchilov and Hutter 2019), and gradient clipping.

An adapter is one contiguous stretch, so a step is a handful of vector operations whatever the number of modules, and it
cannot touch a neighbour's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from tenora.training.commands import AdamWSettings

_SLICE = 2**24
"""Weights that are updated together: what a step makes on its way is as large as they are, 64 MiB here."""

_PIECE = 2**20  # numbers that are float64 at the same time


class Parameters(Protocol):
    """What is optimised; the two views may lie elsewhere at every step."""

    def refresh(self) -> None:
        """The weights have changed: bring what was made from them up to date."""

    @property
    def weights(self) -> Tensor:
        """float32 [n], changed in place."""

    @property
    def grad(self) -> Tensor:
        """float32 [n]."""


class AdamW:
    """Optimizer of one adapter. Every step has settings of its own, so adapters side by side share none.

    Attributes:
        parameters: weights and gradient.
        exp_avg, exp_avg_sq: float32 [n], first and second moments.
        rates: stretches of the weights, which together are all of them, and what the step's rate is multiplied with
            in each, as torch's parameter groups have rates of their own.
        steps: updates done so far.
    """

    def __init__(self, parameters: Parameters, rates: Sequence[tuple[slice, float]] = ()) -> None:
        self.parameters = parameters
        self.rates = tuple(rates) or ((slice(None), 1.0),)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(parameters.weights), torch.zeros_like(parameters.weights)
        self.steps = 0

    @torch.no_grad()
    def step(self, settings: AdamWSettings) -> None:
        """Update the weights from the gradient, as `torch.optim.AdamW` does, decoupled weight decay included.

        The bias of the moments is corrected by the betas of this step, as torch does when they change on the way. The
        last thing it does is `parameters.refresh()`.
        """
        self.steps += 1
        count = len(self.exp_avg)
        for first in range(0, count, _SLICE):
            last = min(first + _SLICE, count)
            denominator = self._moments(slice(first, last), settings)
            for stretch, factor in self.rates:
                start, stop, _ = stretch.indices(count)
                span = slice(max(start, first), min(stop, last))
                if span.start < span.stop:
                    own = denominator[span.start - first : span.stop - first]
                    self._move(span, own, settings, settings.learning_rate * factor)
        self.parameters.refresh()

    def _moments(self, span: slice, settings: AdamWSettings) -> Tensor:
        """Bring the moments up to date; what the first one is divided by."""
        beta1, beta2 = settings.beta1, settings.beta2
        grad, second = self.parameters.grad[span], self.exp_avg_sq[span]
        self.exp_avg[span].lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        return second.sqrt().div_((1 - beta2**self.steps) ** 0.5).add_(settings.epsilon)

    def _move(self, span: slice, denominator: Tensor, settings: AdamWSettings, rate: float) -> None:
        weights = self.parameters.weights[span]
        if settings.weight_decay:
            weights.mul_(1 - rate * settings.weight_decay)
        weights.addcdiv_(self.exp_avg[span], denominator, value=-rate / (1 - settings.beta1**self.steps))

    def let_go(self) -> None:
        """Free the moments: no step follows."""
        self.exp_avg = self.exp_avg_sq = self.exp_avg.new_empty(0)


@torch.no_grad()
def clip_grad_norm(grad: Tensor, max_norm: float) -> float:
    """Scale `grad` in place so that its 2-norm is at most `max_norm` (0 is off); returns the norm before.

    A norm that is not finite is returned as it is and the gradient left alone: the caller stops the run.
    """
    norm = float(torch.linalg.vector_norm(grad)) if len(grad) <= _SLICE else _long_norm(grad)
    if max_norm > 0 and norm > max_norm and norm != float("inf"):
        grad.mul_(max_norm / (norm + 1e-6))
    return norm


def _long_norm(grad: Tensor) -> float:
    """The 2-norm in float64, piece by piece: of 10⁸ numbers torch's float32 sum loses 2% on a CPU."""
    spans = (slice(start, start + _PIECE) for start in range(0, len(grad), _PIECE))
    pieces = [torch.linalg.vector_norm(grad[span], dtype=torch.float64) for span in spans]
    return float(torch.linalg.vector_norm(torch.stack(pieces)))
