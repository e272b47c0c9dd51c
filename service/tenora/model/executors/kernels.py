"""Compiling what the executors of a base call on a CPU, before its first request."""

from __future__ import annotations

from tenora.model.decoder import Decoder
from tenora_kernels.cpu.attention import attention
from tenora_kernels.cpu.decoder import layers, losses
from tenora_kernels.cpu.lowrank import lora

__all__ = ["warm_up"]


def warm_up(decoder: Decoder, *, train: bool) -> None:
    """Compile what the CPU's kernels do for a base, or read it from their cache: no request shall wait.

    Args:
        decoder: the base; nothing happens on another device.
        train: what training needs, too.
    """
    if decoder.device.type != "cpu":
        return
    if decoder.stack is not None:
        decoder.stack.warm_up(train=train)
        if train and layers.supports(decoder.stack, None):
            layers.warm_up(decoder.stack)
            losses.warm_up(decoder.stack)
    elif attention.supports(decoder.dtype, decoder.spec.head_dim):
        attention.warm_up(decoder.dtype)
    if train or decoder.stack is None:
        lora.warm_up(decoder.dtype, train=train)
