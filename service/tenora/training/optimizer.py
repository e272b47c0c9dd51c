"""AdamW on one slot's stretch of the flat float32 arena (Loshchilov and Hutter 2019), and gradient clipping.

An adapter is one contiguous stretch, so a step is a handful of vector operations whatever the number of modules, and it
cannot touch a neighbour's weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class AdamW:
    """Optimizer of one adapter.

    Attributes:
        weights: float32 [n], a view of the arena; changed in place.
        grad: float32 [n], a view of the gradient arena.
        exp_avg, exp_avg_sq: float32 [n], first and second moments.
        steps: updates done so far.
    """

    def __init__(self, weights: Tensor, grad: Tensor, *, weight_decay: float) -> None:
        self.weights, self.grad, self.weight_decay = weights, grad, weight_decay
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(weights), torch.zeros_like(weights)
        self.steps = 0

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the weights from `grad`, as `torch.optim.AdamW` does, decoupled weight decay included."""
        self.steps += 1
        self.exp_avg.lerp_(self.grad, 1 - BETA1)
        self.exp_avg_sq.mul_(BETA2).addcmul_(self.grad, self.grad, value=1 - BETA2)
        denominator = self.exp_avg_sq.sqrt().div_((1 - BETA2**self.steps) ** 0.5).add_(EPSILON)
        if self.weight_decay:
            self.weights.mul_(1 - learning_rate * self.weight_decay)
        self.weights.addcdiv_(self.exp_avg, denominator, value=-learning_rate / (1 - BETA1**self.steps))

    def zero_grad(self) -> None:
        """Clear the gradient for the next step."""
        self.grad.zero_()


@torch.no_grad()
def clip_grad_norm(grad: Tensor, max_norm: float) -> float:
    """Scale `grad` in place so that its 2-norm is at most `max_norm` (0 is off); returns the norm before.

    A norm that is not finite is returned as it is and the gradient left alone: the caller stops the run.
    """
    norm = float(torch.linalg.vector_norm(grad))
    if max_norm > 0 and norm > max_norm and norm != float("inf"):
        grad.mul_(max_norm / (norm + 1e-6))
    return norm
