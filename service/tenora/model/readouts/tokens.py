"""The next token's scores: final norm, the base's head and cross-entropy."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from tenora.model.decoder import Decoder
from tenora.model.readouts.base import Read, Readout, ReadPositions
from tenora_kernels.cpu.decoder.losses import StreamLosses

# float32 logits alive at once on the modules' way.
_LOGITS_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}


@dataclass(frozen=True, slots=True)
class TokenReadout:
    """The frozen head of a decoder. Losses are nats, minus the target's log-probability."""

    decoder: Decoder

    def see(self, layer: int, hidden: Tensor, predict_at: Tensor) -> None:
        """See `Readout`; it reads the last layer only."""

    def read(
        self, hidden: Tensor, predict_at: Tensor, targets: Tensor, coefficients: Tensor | None
    ) -> Generator[None, None, Read]:
        """See `Readout`; a target is a token."""
        stack = self.decoder.stack
        if stack is None or hidden.dtype != torch.float32:
            return (yield from _module_losses(self.decoder, hidden, predict_at, targets, coefficients))
        return Read(*(yield from StreamLosses(stack, hidden, predict_at, targets).run(coefficients)))


class Tokens:
    """`ReadoutKind` of the next token: the head is the base's, whoever's adapter is before it."""

    def over(self, decoder: Decoder, _where: ReadPositions, /) -> Readout:
        """See `ReadoutKind`."""
        return TokenReadout(decoder)


TOKENS = Tokens()


def _module_losses(
    decoder: Decoder, hidden: Tensor, predict_at: Tensor, targets: Tensor, coefficients: Tensor | None
) -> Generator[None, None, Read]:
    """In torch, in chunks: [n, V] never exists whole.

    The gradient of a chunk's logits is (softmax - one-hot) · coefficient, made in place of the logits themselves.
    """
    budget = _LOGITS_BYTES.get(hidden.device.type, _LOGITS_BYTES["cpu"])
    size = max(16, budget // (4 * decoder.spec.vocab_size))
    source = hidden.detach().requires_grad_(coefficients is not None)
    with torch.set_grad_enabled(coefficients is not None):
        finished = decoder.finish(source[predict_at])
    found: list[Tensor] = [finished.new_zeros(0, dtype=torch.float32)]
    correct: list[Tensor] = [targets.new_zeros(0, dtype=torch.bool)]
    gradients: list[Tensor] = [finished.detach().new_zeros(0, finished.shape[1])]
    for start in range(0, len(targets), size):
        part, wanted = finished.detach()[start : start + size], targets[start : start + size, None]
        part.requires_grad_(coefficients is not None)
        with torch.set_grad_enabled(coefficients is not None):
            scores = decoder.logits(part)
        logits = scores.detach()
        normalizer = logits.logsumexp(dim=1, keepdim=True)
        found.append((normalizer - logits.gather(1, wanted))[:, 0])
        correct.append(logits.argmax(dim=1) == wanted[:, 0])
        if coefficients is not None:
            slope = logits.sub_(normalizer).exp_()
            slope.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=slope.dtype))
            slope.mul_(coefficients[start : start + size, None])
            gradients.extend(torch.autograd.grad(scores, part, slope))
        yield
    gradient = None
    if coefficients is not None:
        (gradient,) = torch.autograd.grad(finished, source, torch.cat(gradients))
    return Read(torch.cat(found), torch.cat(correct), gradient)
