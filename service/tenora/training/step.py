"""Forward and backward through the frozen decoder, in slices small enough to share a device with serving.

A pass holds rows of one or of many adapters in one stream of tokens, and may be left between any two layers: it is a
generator that yields there. The weights of the base never get a gradient: dX passes through them, and dA and dB are
added to the arena of the adapters. Grad mode is expected to be off around it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tenora.adapters.table_rows import RowKind
from tenora.model.attention import Attention, PackedAttention
from tenora.model.context import ForwardContext
from tenora.model.decoder import Decoder
from tenora.model.executors.choice import layer_pass
from tenora.model.executors.layers import Keep, LayerPass
from tenora.model.learned_prefix import LearnedPrefixes, PrefixedAttention
from tenora.model.readouts.base import Read, Readout, ReadoutKind, ReadPositions
from tenora.model.readouts.tokens import TOKENS
from tenora.training.arena import TrainedAdapter
from tenora.training.packing import PackedRows
from tenora.training.virtual import LearnedEmbeddings, behind_prefix, behind_prompt
from tenora_kernels.layout import BASE, LoraBatch, LoraTables, build_segments


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one adapter in a pass.

    Attributes:
        rows: packed.
        adapter: whose; None runs the base.
        dropout: where its dropout takes its numbers; None if there is none.
    """

    rows: PackedRows
    adapter: TrainedAdapter | None = None
    dropout: Dropout | None = None


@dataclass(slots=True)
class Pass:
    """Parts side by side in one stream of T tokens on the device, with what every layer needs.

    Attributes:
        input_ids: int64 [T]; predict_at, targets: int64 [n]; see `PackedRows`. Of labelled rows the targets are their
            labels, float32 [n, w], filled up with zeros where other parts have more.
        context: positions, RoPE, attention and adapters.
        learned: where each part's targets lie among the n.
        dropout: None if no part has any.
        readout: what is made of the hidden states.
        first: the first layer that anybody's gradient goes to; their number, if only heads are trained.
        embedded: tokens whose embeddings are learned; None if there are none.
    """

    input_ids: Tensor
    predict_at: Tensor
    targets: Tensor
    context: ForwardContext
    learned: tuple[slice, ...]
    dropout: StreamDropout | None
    readout: Readout
    first: int = 0
    embedded: LearnedEmbeddings | None = None

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.input_ids)


@dataclass(slots=True)
class TokenLosses:
    """Per learned token, in stream order: loss float32 [n] in nats, and bool [n], whether it was the likeliest.

    Of rows that a head reads the same per row, with its scores float32 [n, k]; see `tenora.model.readouts.base.Read`.
    """

    loss: Tensor
    correct: Tensor
    scores: Tensor | None = None

    def part(self, span: slice) -> TokenLosses:
        """Those of a span."""
        return TokenLosses(self.loss[span], self.correct[span], None if self.scores is None else self.scores[span])


Coefficients = Callable[[TokenLosses], Tensor]
"""From the losses of a pass to what each is multiplied with in the objective, float32 [n]."""


class LoraDropout:
    """Inverted dropout of an adapter's inputs, from a generator of its own.

    `seek` picks the numbers of one layer of one microbatch, so that running a layer again (to save memory) or after a
    resume drops the same elements.
    """

    def __init__(self, probability: float, device: torch.device) -> None:
        self._keep = 1.0 - probability
        self._generator = torch.Generator(device)

    def seek(self, seed: int, *position: int) -> None:
        """Continue with the numbers that belong to `seed` and `position` (step, microbatch, layer)."""
        mixed = seed
        for part in position:
            mixed = (mixed * 0x9E3779B97F4A7C15 + part + 1) % 2**63
        self._generator.manual_seed(mixed)

    def fill(self, mask: Tensor) -> None:
        """Make each element of `mask` zero with the probability, else what keeps the mean."""
        mask.bernoulli_(self._keep, generator=self._generator).div_(self._keep)


@dataclass(frozen=True, slots=True)
class Dropout:
    """The dropout of one microbatch of one adapter: which numbers it takes."""

    source: LoraDropout
    seed: int
    step: int
    microbatch: int

    def seek(self, layer: int) -> None:
        """Go to the numbers of `layer`."""
        self.source.seek(self.seed, self.step, self.microbatch, layer)


class StreamDropout:
    """The dropout of a stream of several parts; those without any keep every element."""

    def __init__(self, spans: Sequence[tuple[slice, Dropout]]) -> None:
        self._spans = spans

    def seek(self, layer: int) -> None:
        """Go to the numbers of `layer`, in every part."""
        for _, dropout in self._spans:
            dropout.seek(layer)

    def __call__(self, x: Tensor) -> Tensor:
        """A copy of x [T, n] with elements dropped."""
        mask = torch.ones_like(x, requires_grad=False)
        for span, dropout in self._spans:
            dropout.source.fill(mask[span])
        return x * mask


def load_pass(
    decoder: Decoder, parts: Sequence[Part], tables: LoraTables | None = None, readout: ReadoutKind = TOKENS
) -> Pass:
    """Lay parts side by side on the decoder's device. An adapter may be in several parts of a pass without gradient.

    Args:
        tables: of the arena that the adapters are in; may be None if no part has an adapter.
        readout: what all parts are read by.
    """
    device = decoder.device
    rows, embedded = _with_virtual_tokens(parts, tables)
    tokens = np.cumsum([0, *(packed.tokens for packed in rows)])
    learned = np.cumsum([0, *(len(packed.targets) for packed in rows)])
    starts = np.concatenate([packed.cu_seqlens[:-1] + first for packed, first in zip(rows, tokens[:-1], strict=True)])
    cu_seqlens = np.append(starts, tokens[-1])
    positions = _to(device, [packed.positions for packed in rows])
    row_lengths = np.diff(cu_seqlens)
    predict_at = np.concatenate([packed.predict_at + first for packed, first in zip(rows, tokens[:-1], strict=True)])
    where = ReadPositions(
        np.repeat(_slots(parts), np.diff(learned)),
        starts[np.searchsorted(starts, predict_at, side="right") - 1],
        tables,
    )
    spans = [slice(int(start), int(stop)) for start, stop in pairwise(tokens)]
    dropped = [(span, part.dropout) for span, part in zip(spans, parts, strict=True) if part.dropout is not None]
    dropout = StreamDropout(dropped) if dropped else None
    context = ForwardContext(
        positions=positions,
        rope=decoder.rope(positions, _to(device, [np.repeat(row_lengths, row_lengths)])),
        attention=_attention(parts, rows, cu_seqlens, tables),
        lora=_adapters(parts, rows, tables, device),
        lora_dropout=dropout,
    )
    return Pass(
        input_ids=_to(device, [packed.input_ids for packed in rows]),
        predict_at=_to(device, [predict_at]),
        targets=_targets(device, rows),
        context=context,
        learned=tuple(slice(int(start), int(stop)) for start, stop in pairwise(learned)),
        dropout=dropout,
        readout=readout.over(decoder, where),
        first=min((part.adapter.first_layer for part in parts if part.adapter is not None), default=0),
        embedded=embedded,
    )


def forward(decoder: Decoder, batch: Pass) -> Generator[None, None, TokenLosses]:
    """Losses without a gradient, yielding between layers."""
    layers = layer_pass(decoder, batch.context, Keep.NOTHING)
    try:
        hidden = yield from _upwards(decoder, layers, batch)
        read = yield from batch.readout.read(hidden, batch.predict_at, batch.targets, None)
    finally:
        layers.close()
    return _losses(read)


def forward_backward(
    decoder: Decoder, batch: Pass, coefficients: Tensor | Coefficients, *, keep: Keep
) -> Generator[None, None, TokenLosses]:
    """Losses, and the gradient of Σ coefficient · loss added to the tables' gradient arena, yielding between layers.

    Args:
        coefficients: float32 [n]; for the mean over an optimizer step one over its learned tokens, so that microbatches
            add up. An objective that is no sum over tokens gives a function: the head then runs once for the losses and
            once for the gradient.
        keep: activations of every layer, or inputs only: a third more work for a fraction of the memory.
    """
    before = None if batch.dropout is None else batch.dropout.seek
    layers = layer_pass(decoder, batch.context, keep, before=before, first=batch.first)
    try:
        hidden = yield from _upwards(decoder, layers, batch)
        if not isinstance(coefficients, Tensor):
            read = yield from batch.readout.read(hidden, batch.predict_at, batch.targets, None)
            coefficients = coefficients(_losses(read))
        read = yield from batch.readout.read(hidden, batch.predict_at, batch.targets, coefficients)
        slope = read.slope
        for index in reversed(range(batch.first, len(decoder.layers))):
            if slope is None:
                raise RuntimeError("a layer gave no gradient although the one below it needs it.")
            # Nothing passes below the first trained layer but to embeddings: otherwise its input needs no gradient.
            need_dx = index > batch.first or batch.embedded is not None
            slope = layers.backward(index, slope, need_dx=need_dx)
            yield
        if batch.embedded is not None and slope is not None:
            batch.embedded.add_gradient(slope)
    finally:
        layers.close()
    return _losses(read)


def _upwards(decoder: Decoder, layers: LayerPass, batch: Pass) -> Generator[None, None, Tensor]:
    """Hidden states [T, H] after the last layer."""
    hidden = decoder.embed(batch.input_ids)
    if batch.embedded is not None:
        batch.embedded.fill(hidden)
    for index in range(len(decoder.layers)):
        hidden = layers.forward(index, hidden)
        if index + 1 < len(decoder.layers):
            batch.readout.see(index - len(decoder.layers), hidden, batch.predict_at)
        yield
    return hidden


def _losses(read: Read) -> TokenLosses:
    return TokenLosses(read.loss, read.correct, read.scores)


def _targets(device: torch.device, rows: Sequence[PackedRows]) -> Tensor:
    """See `Pass.targets`."""
    labels = [packed.labels[packed.target_row] for packed in rows if packed.labels is not None]
    if not labels:
        return _to(device, [packed.targets for packed in rows])
    if len(labels) < len(rows):
        raise ValueError("labelled rows and others share no pass.")
    widest = max(part.shape[1] for part in labels)
    filled = [np.pad(part, ((0, 0), (0, widest - part.shape[1]))) for part in labels]
    return torch.from_numpy(np.concatenate(filled)).to(device)


def _with_virtual_tokens(
    parts: Sequence[Part], tables: LoraTables | None
) -> tuple[list[PackedRows], LearnedEmbeddings | None]:
    """The parts' rows behind the virtual tokens of their adapters, and which of the stream have learned embeddings."""
    laid: list[PackedRows] = []
    spans: list[tuple[slice, int]] = []
    first, row = 0, 0
    for part in parts:
        rows, adapter = part.rows, part.adapter
        if adapter is not None and adapter.prefix:
            rows = behind_prefix(rows, adapter.prefix)
        if adapter is not None and adapter.prompt:
            rows, found = behind_prompt(rows, adapter.prompt)
            row = adapter.rows.row(RowKind.PROMPT)
            spans += [(slice(first + span.start, first + span.stop), adapter.slot) for span in found]
        laid.append(rows)
        first += rows.tokens
    return laid, LearnedEmbeddings(tables, row, spans) if spans and tables is not None else None


def _attention(
    parts: Sequence[Part],
    rows: Sequence[PackedRows],
    cu_seqlens: npt.NDArray[np.int64],
    tables: LoraTables | None,
) -> Attention:
    packed = PackedAttention(cu_seqlens.tolist(), **_prefixes(rows))
    prefixed = [part.adapter for part in parts if part.adapter is not None and part.adapter.prefix]
    if not prefixed or tables is None:
        return packed
    slots = [BASE if part.adapter is None or not part.adapter.prefix else part.adapter.slot for part in parts]
    of_sequence = np.repeat(slots, [len(each.prefixes) for each in rows]).tolist()
    return PrefixedAttention(packed, LearnedPrefixes(tables, prefixed[0].rows.of(RowKind.PREFIX), of_sequence))


def _adapters(
    parts: Sequence[Part], rows: Sequence[PackedRows], tables: LoraTables | None, device: torch.device
) -> LoraBatch | None:
    slots = _slots(parts)
    if tables is None or max(slots) == BASE:
        return None
    of_token = np.repeat(slots, [packed.tokens for packed in rows])
    if any(packed.adapted is not None for packed in rows):
        of_token[~np.concatenate([_adapted(packed) for packed in rows])] = BASE
        if of_token.max(initial=BASE) == BASE:
            return None
    return LoraBatch(tables, build_segments(torch.from_numpy(of_token), device=device))


def _adapted(rows: PackedRows) -> npt.NDArray[np.bool_]:
    """bool [T], the tokens that the adapter acts on."""
    return np.ones(rows.tokens, bool) if rows.adapted is None else rows.adapted


def _slots(parts: Sequence[Part]) -> list[int]:
    return [BASE if part.adapter is None else part.adapter.slot for part in parts]


def _prefixes(parts: Sequence[PackedRows]) -> dict[str, list[tuple[int, int] | None]]:
    """For each sequence of the stream the one whose tokens come before its own, and how many; empty if none has one."""
    found: list[tuple[int, int] | None] = []
    for part in parts:
        first, lengths = len(found), np.diff(part.cu_seqlens).tolist()
        found += [None if before < 0 else (first + before, lengths[before]) for before in part.prefixes]
    return {"prefixes": found} if any(found) else {}


def _to(device: torch.device, arrays: Sequence[npt.NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays)).to(device)
