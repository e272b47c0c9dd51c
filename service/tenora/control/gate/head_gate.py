"""The gate of heads: what serves them must say what training said, and every head must carry weights."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tenora.adapters.heads import Head
from tenora.adapters.peft_format import read_adapter
from tenora.adapters.ref import AdapterRef
from tenora.adapters.safetensors_file import all_finite
from tenora.adapters.table_rows import RowKind, TableRows
from tenora.control.gate.parity import TOLERANCE, Parity
from tenora.control.inference.scoring import Scorer
from tenora.data.dataset import TokenizedDataset
from tenora.errors import TrainingError
from tenora.training.events import PROBE_ROWS, HeadOutcome


def require_heads(directory: str, rows: TableRows, *, max_rank: int) -> Sequence[Head]:
    """The heads of an adapter, whose weights are finite and not all zero.

    Raises:
        TrainingError: code untrained_modules.
    """
    weights = read_adapter(Path(directory), rows, max_rank=max_rank)
    part = next((part for part in weights.parts if part.kind == RowKind.HEAD), None)
    for head in weights.heads:
        own = None if part is None else part.a[head.start : head.stop]
        if head.size and (own is None or not all_finite(own) or not np.any(own)):
            raise TrainingError(
                f"The head {head.name!r} carries no trained weights, so nothing was published; its rows tell it "
                "nothing about their labels. Give rows whose texts differ with their labels.",
                code="untrained_modules",
            )
    return weights.heads


async def compare_heads(
    scorer: Scorer,
    heads: Sequence[Head],
    outcome: HeadOutcome,
    held_out: TokenizedDataset,
    ref: AdapterRef,
    *,
    dtype: str,
    modules: int,
) -> Parity:
    """Ask what serves the adapter for the scores of the first held-out rows.

    Raises:
        TrainingError: code parity_failed.
        UnavailableError, RateLimitedError: as `Scorer.head`.
    """
    tolerance = TOLERANCE.get(dtype, TOLERANCE["bfloat16"])
    head = heads[0]
    rows = range(min(PROBE_ROWS, len(held_out), len(outcome.scores)))
    served = await asyncio.gather(*(scorer.head(held_out.row(row)[0][:-1].tolist(), head, ref) for row in rows))
    gap, worst = 0.0, 0
    for row in rows:
        said = np.array(outcome.scores[row])
        if head.kind == "regression":
            said = (said - head.mean) / head.std
        distance = float(np.abs(np.array(served[row]) - said).max())
        if not distance <= gap:  # also if it is not a number
            gap, worst = distance, row
    if not gap <= tolerance:
        raise TrainingError(
            f"The head would not be served as it was trained, so nothing was published: of held-out row {worst + 1} "
            f"serving says {[round(value, 4) for value in served[worst]]} and training "
            f"{[round(value, 4) for value in outcome.scores[worst]]}; their gap {gap:.3g} may be {tolerance:g} at "
            "most. This is a fault of the server, not of the data; report it.",
            code="parity_failed",
        )
    return Parity(
        rows=len(rows), tokens=len(rows), gap=gap, effect=None, tolerance=tolerance, dtype=dtype, modules=modules
    )
