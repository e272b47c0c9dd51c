"""How much of a device the engine takes. What an operator has not set follows from the device and the base.

On a GPU keys and values get nine tenths of the free memory, less everything else that has to live there. On a CPU the
memory is the whole machine's, and the defaults are those of a laptop. A GPU that is tight for its base gets a laptop's
sequences and adapter slots before it is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tenora.config import ON_CPU, Settings
from tenora.errors import ConfigurationError
from tenora.model.cache import KVCache
from tenora.model.decoder import Decoder
from tenora.model.executors.decode_graphs import decode_sizes
from tenora.model.spec import ModelSpec
from tenora_kernels.gpu.configs import rank_bounds, splits_of

GPU_SEQS, GPU_TOKENS, LARGE_GPU_TOKENS = 256, 2048, 8192
LARGE_GPU_BYTES = 80 * 10**9  # of the whole GPU: from there on a step of so many tokens leaves room enough

_USED = 0.9  # of what is free: the allocator's slack and what others may take in between
_TRAINED = 0.1  # of what is free: adapters in training, their moments, and what a pass keeps
_POOLED = 0.05  # of what is free: the adapter slots, where that is more than on a CPU
_LEAST_TOKENS = 2048  # of keys and values, below which serving is not worth the start
_GRAPH_BYTES_PER_LAYER = 512 * 2**10  # of a captured decode step; an estimate: 33 launches with their arguments
_LOGIT_COPIES = 6  # float32 [sequences, vocabulary] that sampling with filters holds at the same time


@dataclass(frozen=True, slots=True)
class Facts:
    """A device with the base on it, in bytes.

    Attributes:
        type: of device, as torch spells it.
        total: its whole memory.
        free: what this process may still take of it, and what the weights have taken.
        weights: of the base.
    """

    type: str
    total: int = 0
    free: int = 0
    weights: int = 0

    @classmethod
    def of(cls, decoder: Decoder) -> Facts:
        """Those of the device that a decoder is on, as they are now."""
        if decoder.device.type != "cuda":
            return cls(decoder.device.type)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(decoder.device)
        weights = decoder.nbytes
        return cls("cuda", total, free + weights, weights)


@dataclass(frozen=True, slots=True)
class Resources:
    """What the engine takes. The first four are settings of the same names.

    Attributes:
        training_bytes: for adapters in training and their passes; 0 where nothing is set aside for them.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    adapter_pool_bytes: int
    kv_cache_bytes: int
    training_bytes: int = 0

    def chosen(self, settings: Settings) -> dict[str, int]:
        """Those that `settings` left open."""
        return {name: getattr(self, name) for name in ON_CPU if not getattr(settings, name)}

    def settle(self, settings: Settings) -> Settings:
        """The settings with everything settled that was left open."""
        return settings.model_copy(update=self.chosen(settings))


def resources(
    facts: Facts, spec: ModelSpec, settings: Settings, *, dtype: torch.dtype, activations: int = 0
) -> Resources:
    """What the engine takes of a device. What is set is taken as it is set.

    Args:
        facts: the device with the base on it.
        spec: of the base.
        settings: 0 leaves a value to this function.
        dtype: of the base, its keys and values.
        activations: bytes that a step was seen to need beside all of this; the estimate is taken if it is more.

    Raises:
        ConfigurationError: there is no room for enough keys and values, or not for as many as were set. The message
            says what takes how much.
    """
    if facts.type != "cuda":
        return Resources(**{name: getattr(settings, name) or usual for name, usual in ON_CPU.items()})
    asked = settings.kv_cache_bytes + settings.adapter_pool_bytes
    if asked > max(0, facts.free - facts.weights):
        raise ConfigurationError(
            "TENORA_KV_CACHE_BYTES and TENORA_ADAPTER_POOL_BYTES ask for "
            f"{_gb(asked)}, but of {_gb(facts.free)} free memory the base takes {_gb(facts.weights)}; lower them, or "
            "leave them unset."
        )
    tokens = settings.max_num_batched_tokens or (LARGE_GPU_TOKENS if facts.total >= LARGE_GPU_BYTES else GPU_TOKENS)
    training = 0 if settings.role == "serve" else int(facts.free * _TRAINED)
    least = KVCache.bytes_per_block(spec, 1, dtype) * min(_LEAST_TOKENS, spec.max_position_embeddings)
    usual = ON_CPU["adapter_pool_bytes"]
    for offered, slots in ((GPU_SEQS, max(usual, int(facts.free * _POOLED))), (ON_CPU["max_num_seqs"], usual)):
        seqs, pool = settings.max_num_seqs or min(offered, tokens), settings.adapter_pool_bytes or slots
        parts = {
            "weights": facts.weights,
            "a step": max(activation_bytes(spec, tokens, seqs, dtype), activations)
            + scratch_bytes(spec, tokens, settings.max_lora_rank),
            "CUDA graphs": graph_bytes(spec, seqs, settings.max_lora_rank),
            "adapter slots": pool,
            "training": training,
        }
        left = int(facts.free * _USED) - sum(parts.values())
        if settings.kv_cache_bytes or left >= least:
            return Resources(seqs, tokens, pool, settings.kv_cache_bytes or left, training)
    taken = ", ".join(f"{name} {_gb(size)}" for name, size in parts.items() if size)
    advice = "TENORA_ROLE=serve to leave training out, " if training else ""
    raise ConfigurationError(
        f"No room is left for keys and values: of {_gb(facts.free)} free memory {_USED:.0%} are used, and {taken}. Use "
        f"a smaller base or a larger GPU, {advice}or lower TENORA_ADAPTER_POOL_BYTES, TENORA_MAX_NUM_BATCHED_TOKENS or "
        "TENORA_MAX_NUM_SEQS."
    )


def activation_bytes(spec: ModelSpec, tokens: int, seqs: int, dtype: torch.dtype) -> int:
    """About what a step of `tokens` tokens needs that samples for `seqs` sequences: one layer's, then the logits.

    With a layer's go the keys and values of the longest sequence, gathered.
    """
    layer = 6 * spec.hidden_size + 2 * (spec.q_size + 2 * spec.kv_size) + 4 * spec.intermediate_size
    gathered = 2 * spec.kv_size * spec.context_length
    return (tokens * layer + gathered) * dtype.itemsize + _LOGIT_COPIES * 4 * seqs * spec.vocab_size


def scratch_bytes(spec: ModelSpec, tokens: int, max_rank: int) -> int:
    """Of the low-rank kernels: partial sums of three modules at once."""
    widest = max(spec.hidden_size, spec.q_size, spec.intermediate_size)
    planes = max(splits_of(widest, small=False) * tokens, splits_of(widest, small=True) * min(tokens, 256))
    return planes * 3 * 4 * max_rank


def graph_bytes(spec: ModelSpec, seqs: int, max_rank: int) -> int:
    """Of all captured decode steps: every size without adapters, and with them once per bound of their ranks."""
    return len(decode_sizes(seqs)) * (1 + len(rank_bounds(max_rank))) * spec.num_layers * _GRAPH_BYTES_PER_LAYER


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
