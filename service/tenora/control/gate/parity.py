"""The gate before publishing: serving must compute what training computed, and every module must be trained."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from tenora.adapters.peft_format import read_adapter
from tenora.adapters.ref import AdapterRef
from tenora.adapters.safetensors_file import Array, all_finite, as_float32
from tenora.adapters.table_rows import RowKind, TableRows
from tenora.adapters.weights import AdapterPart, LoraModule
from tenora.control.inference.scoring import Scorer
from tenora.data.dataset import TokenizedDataset
from tenora.errors import TrainingError
from tenora.training.kinds.table import find_kind
from tenora.training.spec import LoraSpec

TOLERANCE = {"float32": 2e-3, "bfloat16": 0.75, "float16": 0.1}
"""Largest gap between the two paths' log-probabilities of one token, in nats, by the type that the base computes in.

The paths differ in the order of sums, and below float32 also in where they round. Measured after short runs: in float32
3e-6 on random models of three layers and 4e-5 on SmolLM2-135M, in bfloat16 0.08 and 0.20, over 28 and 114 tokens, where
adapters move the base by 20 and 4 nats. The bounds leave room for more tokens and deeper bases, since a sound adapter
must not fail; what they can catch is seen by the adapter's effect beside them. float16 keeps three more bits than
bfloat16 and was not measured.
"""
PROBE_TOKENS = 192  # of all probe rows: a finished adapter waits for them, a third of a second on two cores
_ROW_TOKENS = 192  # of one of them, unless what it teaches comes later
_NAMED = 8


class Parity(msgspec.Struct, frozen=True, kw_only=True):
    """What the gate saw.

    Attributes:
        rows, tokens: how much was compared; 0 if the run named no probe rows.
        gap: largest difference of a token's log-probability between serving and training, in nats; None without rows.
        effect: largest difference that the adapter makes to the base on the same tokens: a gap means nothing beside an
            effect that is no larger. None if the base was not measured.
        tolerance: what the gap may be.
        dtype: what the base computes in.
        modules: adapted modules, all with weights that are finite and not zero.
    """

    rows: int
    tokens: int
    gap: float | None
    effect: float | None
    tolerance: float
    dtype: str
    modules: int


@dataclass(frozen=True, slots=True)
class ProbeRow:
    """A held-out row, cut to what is compared.

    Attributes:
        tokens: of the row.
        learned: the places of the learned ones among them, ascending, above 0.
    """

    tokens: list[int]
    learned: list[int]


def probe_rows(dataset: TokenizedDataset) -> list[ProbeRow]:
    """The first rows, as many as PROBE_TOKENS hold, at least one. Long ones lose their end: what is before stays so."""
    rows: list[ProbeRow] = []
    total = 0
    for index in range(len(dataset)):
        tokens, weights = dataset.row(index)
        learned = np.flatnonzero(weights)
        if not len(learned):
            break  # cannot be compared, and the order is the run's
        end = min(len(tokens), max(_ROW_TOKENS, int(learned[0]) + 64))
        total += end
        if rows and total > PROBE_TOKENS:
            break
        rows.append(ProbeRow(tokens[:end].tolist(), learned[learned < end].tolist()))
    return rows


async def score_rows(scorer: Scorer, rows: Sequence[ProbeRow], adapter: AdapterRef | None) -> list[list[float]]:
    """Log-probabilities of the learned tokens of each row, scored together."""
    return await asyncio.gather(*(scorer.score(row.tokens, row.learned, adapter) for row in rows))


def require_weights(directory: str, rows: TableRows, lora: LoraSpec | None, *, max_rank: int) -> int:
    """Read the adapter and return how many modules, blocks or layers of the base it changes.

    Args:
        directory: path of a PEFT directory.
        rows: those of the base that an adapter can fill.
        lora: the shape that was to be trained; None wants nothing of it but that it is readable.

    Raises:
        TrainingError: code untrained_modules; the message names modules that are missing, not finite or as they began.
        AdapterFormatError: not an adapter of this base.
    """
    weights = read_adapter(Path(directory), rows, max_rank=max_rank)
    found: dict[tuple[RowKind, str], LoraModule | AdapterPart] = {}
    found |= {(RowKind.LOW_RANK, path): module for path, module in weights.modules.items()}
    found |= {(part.kind, part.path): part for part in weights.parts}
    if lora is None:
        return len({path for _, path in found})
    kind = find_kind(lora.type)
    ranks = kind.ranks(rows, lora)
    wanted = [row for row, rank in zip(rows.rows, ranks, strict=True) if rank and row.kind in kind.learned]
    bad: list[str] = []
    for row in wanted:
        one = found.get((row.kind, row.path))
        if one is None:
            bad.append(f"{row.path} (missing)")
        elif not (all_finite(one.a) and all_finite(one.bt)):
            bad.append(f"{row.path} (not finite)")
        elif (fault := _unchanged(one, row.kind)) is not None:
            bad.append(f"{row.path} ({fault})")
    if bad:
        more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        raise TrainingError(
            f"{len(bad)} of the adapter's modules carry no trained weights: {', '.join(bad[:_NAMED])}{more}. "
            "Nothing was published; train for more steps or with a higher learning rate, or leave these modules out of "
            "the adapter's target_modules.",
            code="untrained_modules",
        )
    return len({row.path for row in wanted})


def _unchanged(one: LoraModule | AdapterPart, kind: RowKind) -> str | None:
    """What shows that a row does not change the base; None if nothing does."""
    if kind in (RowKind.LOW_RANK, RowKind.BOTTLENECK):
        return "zero" if _is_zero(one.a, one.dtype) or _is_zero(one.bt, one.dtype) else None
    return "all 1" if kind == RowKind.SCALE and (as_float32(one.a) == 1).all() else None


def compare_paths(
    rows: Sequence[ProbeRow],
    serving: Sequence[Sequence[float]],
    training: Sequence[Sequence[float]],
    base: Sequence[Sequence[float]],
    *,
    dtype: str,
    modules: int,
) -> Parity:
    """Hold the two paths' log-probabilities of the learned tokens against each other.

    Args:
        rows: what was scored by the serving path, with `serving` as the result.
        training: of the same rows, perhaps whole and more of them; of a row that was cut the beginning counts.
        base: the base's through the serving path, of the first rows; may be empty.

    Raises:
        TrainingError: code parity_failed; the message names the numbers.
    """
    tolerance = TOLERANCE.get(dtype, TOLERANCE["bfloat16"])
    compared = min(len(rows), len(training))
    gap, worst = 0.0, (0, 0)
    effects: list[float] = []
    for index in range(compared):
        served = np.array(serving[index])
        gaps = np.abs(served - np.array(training[index][: len(served)]))
        place = int(gaps.argmax())
        if not gaps[place] <= gap:  # also if it is not a number
            gap, worst = float(gaps[place]), (index, place)
        if index < len(base):
            effects.append(float(np.abs(served - np.array(base[index])).max()))
    effect = max(effects, default=None)
    if not gap <= tolerance:
        row, place = worst
        raise TrainingError(
            f"The adapter would not be served as it was trained, so nothing was published: on held-out row {row + 1}, "
            f"token {rows[row].learned[place] + 1}, serving gives a log-probability of {serving[row][place]:.4g} and "
            f"training {training[row][place]:.4g}; their gap {gap:.3g} may be {tolerance:g} at most"
            + (f" (the adapter moves the base by up to {effect:.3g})" if effect is not None else "")
            + ". This is a fault of the server, not of the data; report it.",
            code="parity_failed",
        )
    return Parity(
        rows=compared,
        tokens=sum(len(row.learned) for row in rows[:compared]),
        gap=gap if compared else None,
        effect=effect,
        tolerance=tolerance,
        dtype=dtype,
        modules=modules,
    )


def _is_zero(values: Array, dtype: str) -> bool:
    if dtype == "bfloat16":  # bits as uint16: the sign of a zero is no value
        return not (values & np.uint16(0x7FFF)).any()
    return not values.any()
