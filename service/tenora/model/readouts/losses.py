"""What heads learn: a loss for each row from its scores, in plain torch. Whoever wants gradients asks autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class RowLosses(NamedTuple):
    """Of m rows.

    Attributes:
        loss: [m].
        correct: bool [m], whether the row is right, as its loss understands that.
    """

    loss: Tensor
    correct: Tensor


class HeadLoss(Protocol):
    """A loss of heads. Two that are equal may share a pass."""

    def __call__(self, scores: Tensor, targets: Tensor) -> RowLosses:
        """Losses of the rows of one adapter in a pass.

        Args:
            scores: [m, k].
            targets: [m, w], w at least what the loss reads.
        """
        ...


@dataclass(frozen=True, slots=True)
class ClassLoss:
    """Cross-entropy of one class of k: the target is its number. Nats."""

    def __call__(self, scores: Tensor, targets: Tensor) -> RowLosses:
        """See `HeadLoss`."""
        target = targets[:, 0].long()
        return RowLosses(F.cross_entropy(scores, target, reduction="none"), scores.argmax(dim=1) == target)


@dataclass(frozen=True, slots=True)
class LabelsLoss:
    """Binary cross-entropy of k labels of which any may hold, the mean over them: 1 where one holds, else 0. Nats.

    A row is right if all its labels are.
    """

    def __call__(self, scores: Tensor, targets: Tensor) -> RowLosses:
        """See `HeadLoss`."""
        target = targets[:, : scores.shape[1]].to(scores.dtype)
        losses = F.binary_cross_entropy_with_logits(scores, target, reduction="none")
        return RowLosses(losses.mean(dim=1), ((scores > 0) == (target > 0)).all(dim=1))


@dataclass(frozen=True, slots=True)
class SquaredError:
    """The squared distance to k numbers, the mean over them. A row is right if it is nearer than one unit."""

    def __call__(self, scores: Tensor, targets: Tensor) -> RowLosses:
        """See `HeadLoss`."""
        errors = (scores - targets[:, : scores.shape[1]].to(scores.dtype)).square().mean(dim=1)
        return RowLosses(errors, errors.detach() < 1)


@dataclass(frozen=True, slots=True)
class NegatedScore:
    """Minus the score itself, for objectives that compare scores of rows: rewards, values."""

    def __call__(self, scores: Tensor, targets: Tensor) -> RowLosses:  # noqa: ARG002  # the protocol's
        """See `HeadLoss`."""
        return RowLosses(-scores[:, 0], torch.zeros(len(scores), dtype=torch.bool, device=scores.device))


@dataclass(frozen=True, slots=True)
class ContrastiveLoss:
    """InfoNCE (van den Oord et al. 2018) of anchors, each with its positive among all candidates of the adapter's rows.

    The candidates of an anchor are the positives and the negatives of every example, and never rows of another
    adapter; similarity is the cosine over τ. A target is (example, role): 0 an anchor, 1 its positive, 2 a negative.
    Only anchors have a loss, that of other rows is 0. An anchor is right if no candidate is nearer than its positive.

    Attributes:
        temperature: τ.
    """

    temperature: float = 0.05

    def __call__(self, scores: Tensor, targets: Tensor) -> RowLosses:
        """See `HeadLoss`."""
        example, role = targets[:, 0].long(), targets[:, 1].long()
        anchors, candidates = (role == 0).nonzero()[:, 0], (role > 0).nonzero()[:, 0]
        unit = F.normalize(scores, dim=1)
        similar = unit[anchors] @ unit[candidates].t() / self.temperature
        own = (example[anchors, None] == example[None, candidates]) & (role[None, candidates] == 1)
        positive = own.int().argmax(dim=1)
        losses = scores.new_zeros(len(scores)).index_copy(
            0, anchors, F.cross_entropy(similar, positive, reduction="none")
        )
        correct = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        correct[anchors] = similar.argmax(dim=1) == positive
        return RowLosses(losses, correct)
