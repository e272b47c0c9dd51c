"""Loss and accuracy on held-out rows."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from tenora.model.decoder import Decoder
from tenora.training.dataset import TokenizedDataset
from tenora.training.packing import microbatches
from tenora.training.step import forward, load_microbatch
from tenora_kernels.layout import LoraTables

_PACKED_AT_ONCE = 64  # rows; packing is quadratic, and nothing else runs meanwhile


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over all learned tokens of a dataset: loss in nats, and how often the token was the most likely one."""

    loss: float
    accuracy: float


def evaluate(
    decoder: Decoder, dataset: TokenizedDataset, tables: LoraTables | None, *, capacity: int, slot: int = 0
) -> Generator[None, None, Evaluation]:
    """Measure the adapter in `slot`, or with `tables` None the base, yielding between layers.

    Args:
        capacity: tokens of a microbatch.

    Returns:
        The means; the same whatever the capacity, but for the order of additions.
    """
    loss, correct, tokens = 0.0, 0, 0
    for first in range(0, len(dataset), _PACKED_AT_ONCE):
        rows = range(first, min(first + _PACKED_AT_ONCE, len(dataset)))
        for packed in microbatches(dataset, rows, capacity):
            found = yield from forward(decoder, load_microbatch(decoder, packed, tables, slot=slot))
            loss += float(found.loss.double().sum())
            correct += int(found.correct.sum())
            tokens += len(found.loss)
    return Evaluation(loss / max(tokens, 1), correct / max(tokens, 1))
