"""Rows through the copy of the base, forward and backward to its own weights.

Only the inputs of layers are kept on the way up; on the way down each layer runs a second time, with a graph that is
gone before the next one's is made. Scores exist in chunks. Gradients are added where they are, so beside weights,
gradients and moments there is never more than the inside of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tenora.model.decoder import Decoder
from tenora.training.full.weights import FullWeights
from tenora.training.packing import PackedRows
from tenora.training.pass_queue import Objective
from tenora.training.step import Part, Pass, TokenLosses, load_pass

__all__ = ["Divergence", "diverge", "finished_states", "head_of", "learn", "measure"]

_LOGITS_BYTES = 16 * 2**20  # float32 scores alive at once


@torch.no_grad()
def measure(decoder: Decoder, rows: PackedRows) -> TokenLosses:
    """The losses of a part's learned tokens, without a gradient."""
    batch = load_pass(decoder, [Part(rows)])
    states = decoder.finish(decoder_states(decoder, batch)[batch.predict_at])
    return _scored(decoder, states, batch.targets)


@torch.no_grad()
def finished_states(decoder: Decoder, rows: PackedRows) -> Tensor:
    """What the head reads at each learned token of a part, float32 [n, H]."""
    batch = load_pass(decoder, [Part(rows)])
    return decoder.finish(decoder_states(decoder, batch)[batch.predict_at])


@torch.no_grad()
def learn(weights: FullWeights, rows: PackedRows, objective: Objective) -> TokenLosses:
    """The losses of a part's learned tokens; the gradient of the objective is added to that of the weights."""
    decoder = weights.decoder
    batch = load_pass(decoder, [Part(rows)])
    inputs: list[Tensor] = []
    hidden = decoder_states(decoder, batch, inputs)
    source = hidden[batch.predict_at].requires_grad_()
    with torch.enable_grad():
        finished = decoder.finish(source)
    states = finished.detach()
    known = states.new_zeros(len(batch.targets))
    if objective.needs_losses:
        known = _scored(decoder, states, batch.targets).loss
    slope = torch.empty_like(states)
    found = _scored(decoder, states, batch.targets, objective.coefficients(rows, known), slope, weights.head_grad)
    torch.autograd.backward(finished, slope)
    above = torch.zeros_like(hidden).index_add_(0, batch.predict_at, _gradient(source))
    del hidden, source, finished, states, slope
    for index in reversed(range(len(decoder.layers))):
        if index < weights.lowest_layer:
            break  # nothing below is trained
        below = inputs.pop().requires_grad_(index > weights.lowest_layer or weights.embedding_grad is not None)
        with torch.enable_grad():
            out = decoder.layers[index](below, batch.context)
        torch.autograd.backward(out, above)
        del out
        if below.requires_grad:
            above = _gradient(below)
    if weights.embedding_grad is not None:
        weights.embedding_grad.index_add_(0, batch.input_ids, above)
    return found


@dataclass(frozen=True, slots=True)
class Divergence:
    """Sums over tokens: loss, the model's own, and KL(model ‖ this)."""

    loss: float
    model_loss: float
    kl: float
    tokens: int

    def __add__(self, other: Divergence) -> Divergence:
        """Over the tokens of both."""
        return Divergence(
            self.loss + other.loss,
            self.model_loss + other.model_loss,
            self.kl + other.kl,
            self.tokens + other.tokens,
        )


@torch.no_grad()
def diverge(
    decoder: Decoder, states: Tensor, model_states: Tensor, targets: Tensor, model_head: Tensor | None
) -> Divergence:
    """What a decoder makes of tokens beside what a model does, chunk by chunk.

    Args:
        states, model_states: [n, H] of the decoder and of the model.
        model_head: [V, H]; None is the decoder's own.
    """
    head = head_of(decoder)
    size = max(16, _LOGITS_BYTES // (8 * len(head)))
    total = Divergence(0.0, 0.0, 0.0, 0)
    for start in range(0, len(targets), size):
        span, wanted = slice(start, start + size), targets[start : start + size, None]
        own = (states[span] @ head.t()).log_softmax(dim=1)
        model = (model_states[span] @ (head if model_head is None else model_head).t()).log_softmax(dim=1)
        loss, model_loss = (float(-one.gather(1, wanted).double().sum()) for one in (own, model))
        kl = float((model.exp() * (model - own)).double().sum())
        total += Divergence(loss, model_loss, kl, len(wanted))
    return total


def decoder_states(decoder: Decoder, batch: Pass, inputs: list[Tensor] | None = None) -> Tensor:
    """Hidden states [T, H] after the last layer; `inputs` gets those before each layer."""
    hidden = decoder.embed(batch.input_ids)
    for layer in decoder.layers:
        if inputs is not None:
            inputs.append(hidden)
        hidden = layer(hidden, batch.context)
    return hidden


def _scored(
    decoder: Decoder,
    states: Tensor,
    targets: Tensor,
    coefficients: Tensor | None = None,
    slope: Tensor | None = None,
    head_grad: Tensor | None = None,
) -> TokenLosses:
    """Cross-entropy of the head's scores, chunk by chunk.

    Args:
        states: [n, H], after the final norm.
        coefficients: [n]; with them `slope` [n, H] becomes the gradient of Σ coefficient · loss, and `head_grad` [V, H]
            has the head's added to it.
    """
    head = head_of(decoder)
    size = max(16, _LOGITS_BYTES // (4 * len(head)))
    loss, correct = states.new_empty(len(targets)), torch.empty(len(targets), dtype=torch.bool, device=states.device)
    for start in range(0, len(targets), size):
        span = slice(start, min(start + size, len(targets)))
        scores, wanted = states[span] @ head.t(), targets[span, None]
        normalizer = scores.logsumexp(dim=1, keepdim=True)
        loss[span] = (normalizer - scores.gather(1, wanted))[:, 0]
        correct[span] = scores.argmax(dim=1) == wanted[:, 0]
        if coefficients is None or slope is None:
            continue
        # softmax - one-hot, in place of the scores themselves
        scores.sub_(normalizer).exp_().scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=scores.dtype))
        scores.mul_(coefficients[span, None])
        torch.matmul(scores, head, out=slope[span])
        if head_grad is not None:
            head_grad.addmm_(scores.t(), states[span])
    return TokenLosses(loss, correct)


def head_of(decoder: Decoder) -> Tensor:
    """The head [V, H], as it is."""
    values: Tensor = decoder.lm_head.values  # type: ignore[attr-defined]  # `FullWeights` sees that it is dense
    return values.detach()


def _gradient(tensor: Tensor) -> Tensor:
    if tensor.grad is None:
        raise RuntimeError("nothing flowed back to a layer's input.")
    return tensor.grad
