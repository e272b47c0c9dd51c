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
        weights, grad = self.parameters.weights, self.parameters.grad
        beta1, beta2 = settings.beta1, settings.beta2
        self.steps += 1
        self.exp_avg.lerp_(grad, 1 - beta1)
        self.exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = self.exp_avg_sq.sqrt().div_((1 - beta2**self.steps) ** 0.5).add_(settings.epsilon)
        for stretch, factor in self.rates:
            own, rate = weights[stretch], settings.learning_rate * factor
            if settings.weight_decay:
                own.mul_(1 - rate * settings.weight_decay)
            own.addcdiv_(self.exp_avg[stretch], denominator[stretch], value=-rate / (1 - beta1**self.steps))
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
