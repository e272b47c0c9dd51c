"""AdamW on one adapter's stretch of the flat float32 arena (Loshchilov and Hutter 2019), and gradient clipping.

An adapter is one contiguous stretch, so a step is a handful of vector operations whatever the number of modules, and it
cannot touch a neighbour's weights.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


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
    """Optimizer of one adapter.

    Attributes:
        parameters: weights and gradient.
        exp_avg, exp_avg_sq: float32 [n], first and second moments.
        steps: updates done so far.
    """

    def __init__(self, parameters: Parameters, *, weight_decay: float) -> None:
        self.parameters, self.weight_decay = parameters, weight_decay
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(parameters.weights), torch.zeros_like(parameters.weights)
        self.steps = 0

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the weights from the gradient, as `torch.optim.AdamW` does, decoupled weight decay included.

        The last thing it does is `parameters.refresh()`.
        """
        weights, grad = self.parameters.weights, self.parameters.grad
        self.steps += 1
        self.exp_avg.lerp_(grad, 1 - BETA1)
        self.exp_avg_sq.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
        denominator = self.exp_avg_sq.sqrt().div_((1 - BETA2**self.steps) ** 0.5).add_(EPSILON)
        if self.weight_decay:
            weights.mul_(1 - learning_rate * self.weight_decay)
        weights.addcdiv_(self.exp_avg, denominator, value=-learning_rate / (1 - BETA1**self.steps))
        self.parameters.refresh()


@torch.no_grad()
def clip_grad_norm(grad: Tensor, max_norm: float) -> float:
    """Scale `grad` in place so that its 2-norm is at most `max_norm` (0 is off); returns the norm before.

    A norm that is not finite is returned as it is and the gradient left alone: the caller stops the run.
    """
    norm = float(torch.linalg.vector_norm(grad))
    if max_norm > 0 and norm > max_norm and norm != float("inf"):
        grad.mul_(max_norm / (norm + 1e-6))
    return norm
