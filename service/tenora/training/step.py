"""Forward and backward through the frozen decoder, in slices small enough to share a device with serving.

Each layer has an autograd graph of its own: its input is cut off from the layer below, and the backward pass hands the
gradient of that input down by hand. So the pass can be left between any two layers, as a generator that yields there,
and the weights of the base never get a gradient: `dX` passes through them, and `add_lora` adds dA and dB to the slots'
arena. Nothing passes below the first layer's adapters: neither embeddings nor the first layer's input need a gradient.

Every function here expects grad mode to be off around it and switches it on only where a graph is built, never across
a yield.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tenora.model.attention import PackedAttention
from tenora.model.context import ForwardContext
from tenora.model.decoder import Decoder
from tenora.model.spec import ModelSpec
from tenora.training.packing import PackedRows
from tenora_kernels.layout import LoraBatch, LoraTables, build_segments

# float32 logits alive at once. On a CPU 85 tokens of a vocabulary of 49,152: products are as fast as with more, and the
# pass may be left after about 0.1 s.
_LOGITS_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}


@dataclass(slots=True)
class Microbatch:
    """Packed rows on the device, with what every layer needs.

    Attributes:
        input_ids: int64 [T]; predict_at, targets: int64 [n]; see `PackedRows`.
        context: positions, RoPE, attention and adapters.
    """

    input_ids: Tensor
    predict_at: Tensor
    targets: Tensor
    context: ForwardContext


@dataclass(slots=True)
class TokenLosses:
    """Per learned token, in stream order: loss float32 [n] in nats, and bool [n], whether it was the likeliest."""

    loss: Tensor
    correct: Tensor


class LoraDropout:
    """Inverted dropout of the adapters' inputs, from a generator of its own.

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

    def __call__(self, x: Tensor) -> Tensor:
        """A copy of x in which each element is zero with the probability, else scaled up to keep the mean."""
        mask = torch.empty_like(x, requires_grad=False).bernoulli_(self._keep, generator=self._generator)
        return x * mask.div_(self._keep)


@dataclass(frozen=True, slots=True)
class Dropout:
    """The dropout of one microbatch: which numbers it takes."""

    source: LoraDropout
    seed: int
    step: int
    microbatch: int

    def seek(self, layer: int) -> None:
        """Go to the numbers of `layer`."""
        self.source.seek(self.seed, self.step, self.microbatch, layer)


def load_microbatch(
    decoder: Decoder, packed: PackedRows, tables: LoraTables | None, *, slot: int = 0, dropout: Dropout | None = None
) -> Microbatch:
    """Move packed rows to the decoder's device. `tables` None runs the base without an adapter."""
    device = decoder.device
    positions = torch.from_numpy(packed.positions).to(device)
    row_lengths = np.diff(packed.cu_seqlens)
    lengths = torch.from_numpy(np.repeat(row_lengths, row_lengths))
    lora = None if tables is None else LoraBatch(tables, build_segments([slot] * packed.tokens, device=device))
    context = ForwardContext(
        positions=positions,
        rope=decoder.rope(positions, lengths.to(device)),
        attention=PackedAttention(packed.cu_seqlens.tolist()),
        lora=lora,
        lora_dropout=None if dropout is None else dropout.source,
    )
    return Microbatch(
        input_ids=torch.from_numpy(packed.input_ids).to(device),
        predict_at=torch.from_numpy(packed.predict_at).to(device),
        targets=torch.from_numpy(packed.targets).to(device),
        context=context,
    )


def forward(decoder: Decoder, batch: Microbatch) -> Generator[None, None, TokenLosses]:
    """Losses without a graph, yielding between layers."""
    hidden = decoder.embed(batch.input_ids)
    for layer in decoder.layers:
        hidden = layer(hidden, batch.context)
        yield
    losses, _ = yield from _head(decoder, decoder.finish(hidden[batch.predict_at]), batch.targets, scale=None)
    return losses


def forward_backward(
    decoder: Decoder, batch: Microbatch, *, scale: float, keep_graphs: bool, dropout: Dropout | None = None
) -> Generator[None, None, TokenLosses]:
    """Losses, and the gradient of `scale` · their sum added to the tables' gradient arena, yielding between layers.

    Args:
        scale: one over the learned tokens of the whole optimizer step, so that microbatches add up to its mean.
        keep_graphs: keep every layer's activations for the backward pass. Otherwise only the layers' inputs are kept
            and each layer runs a second time: a third more work for a fraction of the memory.
        dropout: where the adapters' dropout takes its numbers; None if there is none.
    """
    inputs: list[Tensor] = []
    outputs: list[Tensor | None] = []
    hidden = decoder.embed(batch.input_ids)
    for index in range(len(decoder.layers)):
        inputs.append(hidden.requires_grad_(index > 0))
        output = _run_layer(decoder, index, inputs[-1], batch.context, dropout, graph=keep_graphs)
        outputs.append(output if keep_graphs else None)
        hidden = output.detach()
        yield
    losses, gradient = yield from _head_backward(decoder, hidden, batch, scale)
    for index in reversed(range(len(decoder.layers))):
        source, result = inputs.pop(), outputs.pop()
        if result is None:
            result = _run_layer(decoder, index, source, batch.context, dropout, graph=True)
        if index > 0:
            (gradient,) = torch.autograd.grad(result, source, gradient)
        else:
            torch.autograd.backward(result, gradient)
        del source, result
        yield
    return losses


def activation_bytes_per_token(spec: ModelSpec, itemsize: int) -> int:
    """What a kept graph of all layers takes per token, roughly: every product's output and input, norms in float32."""
    attention = 6 * (spec.q_size + 2 * spec.kv_size)
    return spec.num_layers * itemsize * (12 * spec.hidden_size + attention + 7 * spec.intermediate_size)


def _run_layer(
    decoder: Decoder, index: int, source: Tensor, context: ForwardContext, dropout: Dropout | None, *, graph: bool
) -> Tensor:
    if dropout is not None:
        dropout.seek(index)
    with torch.set_grad_enabled(graph):
        output: Tensor = decoder.layers[index](source, context)
    return output


def _head_backward(
    decoder: Decoder, hidden: Tensor, batch: Microbatch, scale: float
) -> Generator[None, None, tuple[TokenLosses, Tensor]]:
    """Final norm and loss of the last layer's output [T, H]; the gradient [T, H] of `scale` · summed loss."""
    hidden.requires_grad_()
    with torch.enable_grad():
        finished = decoder.finish(hidden[batch.predict_at])
    losses, d_finished = yield from _head(decoder, finished.detach(), batch.targets, scale=scale)
    if d_finished is None:
        raise RuntimeError("the loss head gave no gradient although a scale was set.")
    (gradient,) = torch.autograd.grad(finished, hidden, d_finished)
    return losses, gradient


def _head(
    decoder: Decoder, finished: Tensor, targets: Tensor, *, scale: float | None
) -> Generator[None, None, tuple[TokenLosses, Tensor | None]]:
    """Cross-entropy of finished hidden states [n, H] against targets [n], in chunks: [n, V] never exists whole.

    The gradient of a chunk's logits is (softmax - one-hot) · scale, made in place of the logits themselves; with
    `scale` None there is none.
    """
    budget = _LOGITS_BYTES.get(finished.device.type, _LOGITS_BYTES["cpu"])
    size = max(16, budget // (4 * decoder.spec.vocab_size))
    losses: list[Tensor] = []
    correct: list[Tensor] = []
    gradients: list[Tensor] = []
    for start in range(0, len(targets), size):
        part, wanted = finished[start : start + size], targets[start : start + size, None]
        part.requires_grad_(scale is not None)
        with torch.set_grad_enabled(scale is not None):
            scores = decoder.logits(part)
        logits = scores.detach()
        normalizer = logits.logsumexp(dim=1, keepdim=True)
        losses.append((normalizer - logits.gather(1, wanted))[:, 0])
        correct.append(logits.argmax(dim=1) == wanted[:, 0])
        if scale is not None:
            slope = logits.sub_(normalizer).exp_()
            slope.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=slope.dtype)).mul_(scale)
            gradients.extend(torch.autograd.grad(scores, part, slope))
        yield
    empty = finished.new_zeros(0, dtype=torch.float32)
    found = TokenLosses(torch.cat([empty, *losses]), torch.cat([empty.bool(), *correct]))
    return found, torch.cat(gradients) if gradients else None
