"""From logits to tokens: penalties, filters, a draw that depends on the request alone, and log-probabilities."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tenora.engine.messages import SamplingParams, TokenLogprob
from tenora.engine.sequence import SequenceState
from tenora.model.to_device import to_device

CANDIDATES = (256, 4096)  # most likely tokens that a top-k or top-p row looks at before it sorts the whole vocabulary
_BLOCK = 256

# From logits [n, vocab] and their n rows: tokens [n], -1 where there is none to be had.
_Draw = Callable[[Tensor, Sequence[SequenceState]], Tensor]


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token per row, in the rows' order.

    Attributes:
        token_ids: -1 where the row's logits hold a NaN or no possible token.
        logprobs: None for rows that did not ask.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]


def uniform(seed: int, position: int) -> float:
    """The noise of one draw: uniform in [0, 1), a hash of the request's seed and the token's position.

    Counter-based, as Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011): no state that the rest of
    the batch, a preemption or a restart could shift. Multiples of 2^-52, so that it stays below 1 after rounding.
    """
    key = struct.pack("<QQ", seed & (2**64 - 1), position)
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 12) / 2**52


def sample(logits: Tensor, rows: Sequence[SequenceState]) -> Sampled:
    """Choose the next token of each row.

    The order is transformers' and vLLM's: repetition, frequency and presence penalties, bias, minimum length, then
    temperature, top-k, top-p, min-p. Greedy rows (temperature 0) take the largest logit after the processors and do no
    sampling work. Log-probabilities are those of the model itself, before any of it.

    Args:
        logits: float32 [n, vocab]; changed in place by the processors.
        rows: n sequences.
    """
    logprobs: list[TokenLogprob | None] = [None] * len(rows)
    if all(row.plain for row in rows):
        return Sampled(_argmax(logits).tolist(), logprobs)
    wanted = [index for index, row in enumerate(rows) if row.sampling.logprobs is not None]
    raw = torch.log_softmax(logits[_indices(logits, wanted)], dim=-1) if wanted else None
    for group, process in ((_is_penalised, _penalise), (_is_biased, _bias), (_is_too_short, _forbid_stops)):
        if chosen := [index for index, row in enumerate(rows) if group(row)]:
            if len(chosen) == len(rows):
                process(logits, rows)
            else:
                places = _indices(logits, chosen)
                logits[places] = process(logits[places], [rows[index] for index in chosen])
    tokens = _choose(logits, rows)
    if raw is not None:
        picked = [max(tokens[index], 0) for index in wanted]
        for index, entry in zip(
            wanted, describe(raw, picked, [rows[i].sampling.logprobs or 0 for i in wanted]), strict=True
        ):
            logprobs[index] = entry
    return Sampled(tokens, logprobs)


def describe(logprobs: Tensor, token_ids: Sequence[int], top: Sequence[int]) -> list[TokenLogprob]:
    """Log-probability of one token per row and of the row's `top[i]` most likely ones.

    Args:
        logprobs: float [n, vocab], log-softmax already taken.
        token_ids: n tokens.
        top: n counts; 0 lists no alternatives.
    """
    index = _indices(logprobs, token_ids).unsqueeze(1)
    own = logprobs.gather(1, index).squeeze(1).tolist()
    values, ids = logprobs.topk(min(max(top, default=0), logprobs.shape[1]), dim=-1)
    entries = []
    for token, value, count, best, best_ids in zip(token_ids, own, top, values.tolist(), ids.tolist(), strict=True):
        entries.append(TokenLogprob(token, value, tuple(zip(best_ids[:count], best[:count], strict=True))))
    return entries


def _is_penalised(row: SequenceState) -> bool:
    sampling = row.sampling
    return sampling.repetition_penalty != 1.0 or sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0


def _is_biased(row: SequenceState) -> bool:
    return bool(row.sampling.logit_bias)


def _is_too_short(row: SequenceState) -> bool:
    return row.num_output < row.sampling.min_tokens and bool(row.stop_ids)


def _penalise(logits: Tensor, rows: Sequence[SequenceState]) -> Tensor:
    """Repetition penalty (Keskar et al. 2019) on prompt and output; frequency and presence (OpenAI) on the output.

    Only the tokens that occur are looked at: a few hundred of a row's tens of thousands.
    """
    vocab = logits.shape[1]
    seen = np.unique(_keys([row.token_ids for row in rows], vocab))
    said, times = np.unique(_keys([row.token_ids[row.num_prompt :] for row in rows], vocab), return_counts=True)
    counts = np.zeros(len(seen), dtype=np.float32)
    counts[np.searchsorted(seen, said)] = times
    found = (*np.divmod(seen, vocab), counts)
    row_ids, token_ids, output = (to_device(torch.from_numpy(values), logits.device) for values in found)
    repetition, frequency, presence = (
        _column(logits, rows, value).squeeze(1)[row_ids]
        for value in (_repetition_penalty, _frequency_penalty, _presence_penalty)
    )
    values = logits[row_ids, token_ids]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= output * frequency
    values -= (output > 0) * presence
    logits[row_ids, token_ids] = values
    return logits


def _keys(token_ids: Sequence[list[int]], vocab: int) -> npt.NDArray[np.int64]:
    """Each token of each row as row · vocab + token."""
    return np.concatenate([np.array(ids, dtype=np.int64) + row * vocab for row, ids in enumerate(token_ids)])


def _repetition_penalty(sampling: SamplingParams) -> float:
    return sampling.repetition_penalty


def _frequency_penalty(sampling: SamplingParams) -> float:
    return sampling.frequency_penalty


def _presence_penalty(sampling: SamplingParams) -> float:
    return sampling.presence_penalty


def _bias(logits: Tensor, rows: Sequence[SequenceState]) -> Tensor:
    entries = [
        (index, token, bias) for index, row in enumerate(rows) for token, bias in row.sampling.logit_bias.items()
    ]
    row_ids, token_ids, biases = zip(*entries, strict=True)
    at = (_indices(logits, row_ids), _indices(logits, token_ids))
    return logits.index_put_(at, _beside(logits, biases, logits.dtype), accumulate=True)


def _forbid_stops(logits: Tensor, rows: Sequence[SequenceState]) -> Tensor:
    entries = [(index, token) for index, row in enumerate(rows) for token in row.stop_ids]
    row_ids, token_ids = zip(*entries, strict=True)
    logits[_indices(logits, row_ids), _indices(logits, token_ids)] = -torch.inf
    return logits


def _choose(logits: Tensor, rows: Sequence[SequenceState]) -> list[int]:
    """One token per row: arg max, a draw from the whole vocabulary, or a draw from its most likely part.

    They are read from the device once, at the end.
    """
    vocab = logits.shape[1]
    greedy = [row.greedy for row in rows]
    # Looking at every row is cheaper than to gather the greedy ones.
    tokens = _argmax(logits) if any(greedy) else torch.full((len(rows),), -1, device=logits.device)
    kinds: dict[_Draw, list[int]] = {}
    for index, row in enumerate(rows):
        if not greedy[index]:
            filtered = row.sampling.top_p < 1.0 or 0 < row.sampling.top_k < vocab
            kinds.setdefault(_draw_filtered if filtered else _draw, []).append(index)
    for kind, chosen in kinds.items():
        if len(chosen) == len(rows):
            tokens = kind(logits, rows)
        else:
            places = _indices(logits, chosen)
            tokens[places] = kind(logits[places], [rows[index] for index in chosen])
    chosen_tokens: list[int] = tokens.tolist()
    return chosen_tokens


def _argmax(logits: Tensor) -> Tensor:
    """The largest of each row, the first one of several; -1 for a row with a NaN, or without a possible token."""
    # NaN counts as the largest. numpy takes a ninth of the time of torch on the CPU: 0.17 ms for 32 rows of 49,152.
    on_cpu = logits.device.type == "cpu"
    tokens = torch.from_numpy(logits.numpy().argmax(axis=1)) if on_cpu else logits.argmax(dim=-1)
    values = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return torch.where(values.isfinite(), tokens, -1)


def _draw(logits: Tensor, rows: Sequence[SequenceState]) -> Tensor:
    """Inverse-CDF draw over the vocabulary in id order. Two levels (sums of 256) spare a float64 scan of it all."""
    n, vocab = logits.shape
    weights = logits.new_empty(n, -(-vocab // _BLOCK) * _BLOCK)
    weights[:, vocab:] = 0
    torch.sub(logits, logits.amax(dim=-1, keepdim=True), out=weights[:, :vocab])
    weights[:, :vocab].mul_(1 / _column(logits, rows, lambda sampling: sampling.temperature)).exp_()
    if any(row.sampling.min_p > 0 for row in rows):
        weights *= weights >= _column(logits, rows, lambda sampling: sampling.min_p)  # the largest weight is 1
    blocks = weights.view(n, -1, _BLOCK)
    sums = blocks.sum(dim=-1).double()
    block, rest = _invert(sums, _noise(sums, rows) * sums.sum(dim=-1, keepdim=True))
    inner, _ = _invert(blocks[torch.arange(n, device=logits.device), block].double(), rest)
    return torch.where(sums.sum(dim=-1).isfinite(), block * _BLOCK + inner, -1)


def _draw_filtered(logits: Tensor, rows: Sequence[SequenceState]) -> Tensor:
    """Draw from the most likely tokens: from few of them, or from more if a row's top-p or top-k exceeds those.

    Which path a row takes depends on that row alone: its neighbours never change its tokens.
    """
    vocab = logits.shape[1]
    scaled = logits / _column(logits, rows, lambda sampling: sampling.temperature)
    tokens = torch.full((len(rows),), -1, device=logits.device)
    rest = list(range(len(rows)))
    for width in (*(width for width in CANDIDATES if width < vocab), vocab):
        places = _indices(scaled, rest)
        part = scaled if len(rest) == len(rows) else scaled[places]
        tokens[places], complete = _draw_sorted(part, [rows[index] for index in rest], width)
        rest = [index for index, done in zip(rest, complete.tolist(), strict=True) if not done]
        if not rest:
            break
    return tokens


def _draw_sorted(scaled: Tensor, rows: Sequence[SequenceState], width: int) -> tuple[Tensor, Tensor]:
    """Draw among the `width` largest of each row. Also tells which rows needed no more than those."""
    vocab = scaled.shape[1]
    values, ids = _largest(scaled, width)
    top_k = _column(scaled, rows, lambda sampling: sampling.top_k if sampling.top_k > 0 else vocab).long()
    top_p = _column(scaled, rows, lambda sampling: sampling.top_p).double()
    position = torch.arange(width, device=scaled.device)
    values = values.masked_fill(position >= top_k, -torch.inf)
    limited = top_k.squeeze(1) <= width  # the candidates hold all of the row's distribution
    log_total = values.logsumexp(dim=-1)
    if not all(0 < row.sampling.top_k <= width for row in rows):
        log_total = torch.where(limited, log_total, scaled.logsumexp(dim=-1))
    mass = (values - log_total.unsqueeze(1)).double().exp()
    cumulative = mass.cumsum(dim=-1)
    reached = (top_k.squeeze(1) >= vocab) & (cumulative[:, -1] >= top_p.squeeze(1))
    complete = limited | reached | cumulative[:, -1].isnan()
    keep = (cumulative - mass < top_p) & (mass >= mass[:, :1] * _column(mass, rows, lambda sampling: sampling.min_p))
    keep[:, 0] = True
    mass = mass * keep
    total = mass.sum(dim=-1, keepdim=True)
    choice, _ = _invert(mass, _noise(mass, rows) * total)
    chosen = ids.gather(1, choice.unsqueeze(1)).squeeze(1)
    return torch.where(total.squeeze(1).isfinite(), chosen, -1), complete


def _largest(scaled: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest values of each row and their ids, descending, equal ones by id; -inf where a row has fewer.

    On the CPU a pass over maxima of groups finds a bound that at least `width` values reach, and only those are sorted:
    2 ms instead of 13 for the 256 largest of 32 rows of 49,152.
    """
    n, vocab = scaled.shape
    group = vocab // (3 * width)
    if scaled.device.type != "cpu" and width < vocab:
        return scaled.topk(width, dim=-1)
    if group < 2:
        values, ids = scaled.sort(dim=-1, descending=True, stable=True)
        return values[:, :width], ids[:, :width]
    # The groups are interleaved, so that the maxima of neighbouring ones are computed side by side.
    grouped = vocab // group * group
    maxima = torch.cat((scaled[:, :grouped].view(n, group, -1).amax(dim=1), scaled[:, grouped:]), dim=1)
    bound = maxima.kthvalue(maxima.shape[1] - width + 1, dim=1, keepdim=True).values
    rows, ids = (scaled >= bound.clamp(min=torch.finfo(scaled.dtype).min)).nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=n)
    column = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    candidates = scaled.new_full((n, max(width, int(counts.max()))), -torch.inf)
    candidates[rows, column] = scaled[rows, ids]
    candidates[maxima.amax(dim=1).isnan()] = torch.nan  # which no comparison finds
    ids = torch.zeros(candidates.shape, dtype=torch.long).index_put_((rows, column), ids)
    values, order = candidates.sort(dim=-1, descending=True, stable=True)
    return values[:, :width], ids.gather(1, order[:, :width])


def _invert(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Index i with cumsum[i-1] <= target < cumsum[i] per row, never one of zero weight, and target - cumsum[i-1].

    Args:
        weights: float64 [n, k], not negative.
        target: float64 [n, 1]; held just below the row's total, which rounding might reach.
    """
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, target, right=True).clamp_(max=weights.shape[1] - 1)
    before = cumulative.gather(1, index) - weights.gather(1, index)
    return index.squeeze(1), (target - before).clamp_(min=0)


def _noise(like: Tensor, rows: Sequence[SequenceState]) -> Tensor:
    return _beside(like, [uniform(row.seed, row.num_output) for row in rows], torch.float64).unsqueeze(1)


def _column(like: Tensor, rows: Sequence[SequenceState], value: Callable[[SamplingParams], float]) -> Tensor:
    """One value per row as a column [n, 1] that broadcasts over the vocabulary."""
    return _beside(like, [value(row.sampling) for row in rows], like.dtype).unsqueeze(1)


def _indices(like: Tensor, numbers: Sequence[int]) -> Tensor:
    """int64 [n] beside `like`: a list as an index would be copied while everybody waits."""
    return _beside(like, numbers, torch.int64)


def _beside(like: Tensor, numbers: Sequence[float], dtype: torch.dtype) -> Tensor:
    """[n] on the device of `like`."""
    return to_device(torch.tensor(numbers, dtype=dtype), like.device)
