"""What a slot of `LoraTables` is beside its ranks, as bits. Free of torch."""

# Bits of `LoraTables.flags`. The lowest ones are the activation of the slot's bottlenecks, a place in ACTIVATIONS.
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "tanh")
ACTIVATION_BITS = 7
PARALLEL = 8
"""The slot's bottlenecks read the residual stream as it is before their block and its norm, not the block's."""
BIAS_OUTSIDE = 16
"""A scale of the slot does not multiply the bias of its projection (DoRA)."""
SCALES = 32
"""The slot has scales of columns."""
BOTTLENECKS = 64
"""The slot has bottlenecks."""
WITH_RESIDUAL = 128
"""The slot's bottlenecks read the block's output added to the residual stream: what the stream is after the block."""
EPILOGUE = SCALES | BOTTLENECKS
"""Something follows a product or a block: compiled steps want such rows behind the others."""
