"""From logits to tokens: penalties, filters, a draw that depends on the request alone, and log-probabilities."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from tenora.engine.messages import SamplingParams, TokenLogprob
from tenora.engine.sequence import Sequence

GREEDY_BELOW = 1e-5  # temperature
CANDIDATES = 256  # most likely tokens that a top-k or top-p row looks at before it sorts the whole vocabulary
_BLOCK = 256

_Draw = Callable[[Tensor, Rows[Sequence]], Tensor]  # logits [n, vocab], n rows → tokens [n], -1 where impossible


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


def sample(logits: Tensor, rows: Rows[Sequence]) -> Sampled:
    """Choose the next token of each row.

    The order is transformers' and vLLM's: repetition, frequency and presence penalties, bias, minimum length, then
    temperature, top-k, top-p, min-p. Greedy rows (temperature 0) take the largest logit after the processors and do no
    sampling work. Log-probabilities are those of the model itself, before any of it.

    Args:
        logits: float32 [n, vocab]; changed in place by the processors.
        rows: n sequences.
    """
    logprobs: list[TokenLogprob | None] = [None] * len(rows)
    wanted = [index for index, row in enumerate(rows) if row.sampling.logprobs is not None]
    raw = torch.log_softmax(logits[wanted], dim=-1) if wanted else None
    for group, process in ((_is_penalised, _penalise), (_is_biased, _bias), (_is_too_short, _forbid_stops)):
        if chosen := [index for index, row in enumerate(rows) if group(row)]:
            logits[chosen] = process(logits[chosen], [rows[index] for index in chosen])
    tokens = _choose(logits, rows)
    if raw is not None:
        picked = [max(tokens[index], 0) for index in wanted]
        for index, entry in zip(
            wanted, describe(raw, picked, [rows[i].sampling.logprobs or 0 for i in wanted]), strict=True
        ):
            logprobs[index] = entry
    return Sampled(tokens, logprobs)


def describe(logprobs: Tensor, token_ids: Rows[int], top: Rows[int]) -> list[TokenLogprob]:
    """Log-probability of one token per row and of the row's `top[i]` most likely ones.

    Args:
        logprobs: float [n, vocab], log-softmax already taken.
        token_ids: n tokens.
        top: n counts; 0 lists no alternatives.
    """
    index = torch.tensor(list(token_ids), device=logprobs.device).unsqueeze(1)
    own = logprobs.gather(1, index).squeeze(1).tolist()
    values, ids = logprobs.topk(min(max(top, default=0), logprobs.shape[1]), dim=-1)
    entries = []
    for token, value, count, best, best_ids in zip(token_ids, own, top, values.tolist(), ids.tolist(), strict=True):
        entries.append(TokenLogprob(token, value, tuple(zip(best_ids[:count], best[:count], strict=True))))
    return entries


def _is_penalised(row: Sequence) -> bool:
    sampling = row.sampling
    return sampling.repetition_penalty != 1.0 or sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0


def _is_biased(row: Sequence) -> bool:
    return bool(row.sampling.logit_bias)


def _is_too_short(row: Sequence) -> bool:
    return row.num_output < row.sampling.min_tokens and bool(row.stop_ids)


def _penalise(logits: Tensor, rows: Rows[Sequence]) -> Tensor:
    """Repetition penalty (Keskar et al. 2019) on prompt and output; frequency and presence (OpenAI) on the output."""
    everything = _counts(logits, [row.token_ids for row in rows])
    output = _counts(logits, [row.token_ids[row.num_prompt :] for row in rows])
    repetition = _column(logits, rows, lambda sampling: sampling.repetition_penalty)
    scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(everything > 0, scaled, logits)
    logits -= output * _column(logits, rows, lambda sampling: sampling.frequency_penalty)
    logits -= (output > 0) * _column(logits, rows, lambda sampling: sampling.presence_penalty)
    return logits


def _bias(logits: Tensor, rows: Rows[Sequence]) -> Tensor:
    entries = [
        (index, token, bias) for index, row in enumerate(rows) for token, bias in row.sampling.logit_bias.items()
    ]
    row_ids, token_ids, biases = zip(*entries, strict=True)
    at = (torch.tensor(row_ids, device=logits.device), torch.tensor(token_ids, device=logits.device))
    return logits.index_put_(at, torch.tensor(biases, dtype=logits.dtype, device=logits.device), accumulate=True)


def _forbid_stops(logits: Tensor, rows: Rows[Sequence]) -> Tensor:
    for index, row in enumerate(rows):
        logits[index, list(row.stop_ids)] = -torch.inf
    return logits


def _choose(logits: Tensor, rows: Rows[Sequence]) -> list[int]:
    """One token per row: arg max, a draw from the whole vocabulary, or a draw from its most likely part."""
    vocab = logits.shape[1]
    kinds: dict[_Draw, list[int]] = {}
    for index, row in enumerate(rows):
        sampling = row.sampling
        kind: _Draw
        if sampling.temperature < GREEDY_BELOW:
            kind = _argmax
        elif sampling.top_p < 1.0 or 0 < sampling.top_k < vocab:
            kind = _draw_filtered
        else:
            kind = _draw
        kinds.setdefault(kind, []).append(index)
    if len(kinds) == 1:
        (kind,) = kinds
        return [int(token) for token in kind(logits, rows).tolist()]
    tokens = [-1] * len(rows)
    for kind, chosen in kinds.items():
        for index, token in zip(chosen, kind(logits[chosen], [rows[i] for i in chosen]).tolist(), strict=True):
            tokens[index] = int(token)
    return tokens


def _argmax(logits: Tensor, rows: Rows[Sequence]) -> Tensor:  # noqa: ARG001 — the three kinds share a signature
    values, tokens = logits.max(dim=-1)
    return torch.where(values.isfinite(), tokens, -1)


def _draw(logits: Tensor, rows: Rows[Sequence]) -> Tensor:
    """Inverse-CDF draw over the vocabulary in id order. Two levels (sums of 256) spare a float64 scan of it all."""
    n, vocab = logits.shape
    weights = logits.new_zeros(n, -(-vocab // _BLOCK) * _BLOCK)
    temperature = _column(logits, rows, lambda sampling: sampling.temperature)
    torch.exp((logits - logits.amax(dim=-1, keepdim=True)) / temperature, out=weights[:, :vocab])
    if any(row.sampling.min_p > 0 for row in rows):
        weights *= weights >= _column(logits, rows, lambda sampling: sampling.min_p)  # the largest weight is 1
    blocks = weights.view(n, -1, _BLOCK)
    sums = blocks.sum(dim=-1, dtype=torch.float64)
    block, rest = _invert(sums, _noise(sums, rows) * sums.sum(dim=-1, keepdim=True))
    inner, _ = _invert(blocks[torch.arange(n, device=logits.device), block].double(), rest)
    return torch.where(sums.sum(dim=-1).isfinite(), block * _BLOCK + inner, -1)


def _draw_filtered(logits: Tensor, rows: Rows[Sequence]) -> Tensor:
    """Draw from the most likely tokens. A row whose top-p or top-k exceeds the candidates sorts the whole vocabulary.

    Which path a row takes depends on that row alone: its neighbours never change its tokens.
    """
    vocab = logits.shape[1]
    scaled = logits / _column(logits, rows, lambda sampling: sampling.temperature)
    tokens, complete = _draw_sorted(scaled, rows, min(CANDIDATES, vocab))
    if rest := [index for index, done in enumerate(complete.tolist()) if not done]:
        tokens[rest], _ = _draw_sorted(scaled[rest], [rows[index] for index in rest], vocab)
    return tokens


def _draw_sorted(scaled: Tensor, rows: Rows[Sequence], width: int) -> tuple[Tensor, Tensor]:
    """Draw among the `width` largest of each row. Also tells which rows needed no more than those."""
    vocab = scaled.shape[1]
    values, ids = scaled.topk(width, dim=-1)
    top_k = _column(scaled, rows, lambda sampling: sampling.top_k if sampling.top_k > 0 else vocab).long()
    top_p = _column(scaled, rows, lambda sampling: sampling.top_p).double()
    position = torch.arange(width, device=scaled.device)
    values = values.masked_fill(position >= top_k, -torch.inf)
    limited = top_k.squeeze(1) <= width  # the candidates hold all of the row's distribution
    log_total = torch.where(limited, values.logsumexp(dim=-1), scaled.logsumexp(dim=-1))
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


def _noise(like: Tensor, rows: Rows[Sequence]) -> Tensor:
    noise = [uniform(row.seed, row.num_output) for row in rows]
    return torch.tensor(noise, dtype=torch.float64, device=like.device).unsqueeze(1)


def _column(like: Tensor, rows: Rows[Sequence], value: Callable[[SamplingParams], float]) -> Tensor:
    """One value per row as a column [n, 1] that broadcasts over the vocabulary."""
    return torch.tensor([value(row.sampling) for row in rows], dtype=like.dtype, device=like.device).unsqueeze(1)


def _counts(logits: Tensor, token_ids: Rows[list[int]]) -> Tensor:
    """How often each token of the vocabulary occurs, per row: [n, vocab]."""
    rows = torch.tensor(
        [index for index, ids in enumerate(token_ids) for _ in ids], dtype=torch.long, device=logits.device
    )
    ids = torch.tensor([token for ids in token_ids for token in ids], dtype=torch.long, device=logits.device)
    counts = torch.zeros_like(logits)
    return counts.index_put_((rows, ids), torch.ones((), dtype=logits.dtype, device=logits.device), accumulate=True)
