"""Paged attention on CUDA for chunks of prompts: one call of torch's flash attention for all of a step's.

Pages are read in place by the kernels that can (flash attention 3 and later, which `activate` looks for at the start);
torch's own flash attention 2 takes no block tables, so there the cached rows of the step are gathered first, with one
copy per layer.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import attention as flash

from tenora.model.cache import KVCache
from tenora.model.to_device import to_device

__all__ = ["VarlenAttention", "activate", "supports"]

_log = logging.getLogger(__name__)

_PAGED = frozenset({"FA3", "FA4"})
_MOST_DIM, _DIM_STEP = 256, 8
_HOPPER = 9  # major compute capability: the one that flash attention 3 is written for


def varlen_attn(*arguments: Any, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """torch's own, imported at the first call: it brings torch's compiler along, 140 MB that a CPU has no use for."""
    from torch.nn.attention import varlen  # noqa: PLC0415  # see above

    if not _has_gqa(varlen.varlen_attn):
        del options["enable_gqa"]  # torch 2.11 takes fewer key heads than query heads unasked
    found: Tensor | tuple[Tensor, Tensor] = varlen.varlen_attn(*arguments, **options)
    return found


@functools.cache
def _has_gqa(function: Callable[..., Any]) -> bool:
    """Looked up once: the call is one of every layer of every step."""
    return "enable_gqa" in inspect.signature(function).parameters


def supports(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether flash attention takes heads of this type and size: two bytes, up to 256 columns, whole groups of 8."""
    return dtype in {torch.float16, torch.bfloat16} and head_dim <= _MOST_DIM and head_dim % _DIM_STEP == 0


def activate(device: torch.device) -> str:
    """Have torch take flash attention 3 where there are a GPU and a package for it; the name of what it takes now.

    It reads pages where they lie. A package that does not load leaves everything as it is, and says why in the log.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == _HOPPER:
        found = importlib.util.find_spec("flash_attn_interface") is not None
        if found and "FA3" in flash.list_flash_attention_impls():
            try:
                flash.activate_flash_attention_impl("FA3")
            except Exception as error:  # noqa: BLE001  # a package of another build; attention goes on without it
                _log.warning("flash attention 3 cannot be used", exc_info=error)
    return flash.current_flash_attention_impl() or "FA2"


class VarlenAttention:
    """Attention to everything that is cached of each sequence; arguments as those of `paged_attention`.

    Everything that a layer needs is on the device before the first one: a step has no synchronisation. Splits over the
    keys are off, because their number would depend on the longest sequence of the batch, and with it a row's bits.
    """

    def __init__(
        self,
        cache: KVCache,
        kv_slots: Tensor,
        query_start: Sequence[int],
        context_lens: Sequence[int],
        block_tables: Tensor,
    ) -> None:
        self._cache = cache
        self._kv_slots = kv_slots
        self._longest_query = max((stop - start for start, stop in pairwise(query_start)), default=0)
        self._longest_context = max(context_lens, default=0)
        self._query_start = to_device(torch.tensor(query_start, dtype=torch.int32), kv_slots.device)
        self._contexts = to_device(torch.tensor(context_lens, dtype=torch.int32), kv_slots.device)
        self._block_tables = block_tables.int()
        self._paged = flash.current_flash_attention_impl() in _PAGED
        self._gathered: Tensor | None = None
        self._key_start: Tensor | None = None
        if not self._paged:
            self._plan_gather(context_lens)

    @staticmethod
    def supports(cache: KVCache) -> bool:
        """Whether the cache lies on a GPU, in a type and with heads that flash attention takes."""
        keys = cache.k[0]
        if keys.device.type != "cuda" or not supports(keys.dtype, keys.shape[3]):
            return False
        return torch.cuda.get_device_capability(keys.device)[0] >= 8

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """See `Attention.attend`. The cache of `layer` is changed in place."""
        self._cache.write(layer, self._kv_slots, k, v)
        reach = (-1 if window is None else window - 1, 0)
        if self._gathered is None:
            out = varlen_attn(
                q, self._cache.k[layer], self._cache.v[layer], self._query_start, None, self._longest_query,
                self._longest_context, window_size=reach, enable_gqa=True, seqused_k=self._contexts,
                block_table=self._block_tables, num_splits=1,
            )  # fmt: skip
        else:
            keys, values = self._cache.read(layer, self._gathered)
            out = varlen_attn(
                q, keys, values, self._query_start, self._key_start, self._longest_query, self._longest_context,
                window_size=reach, enable_gqa=True,
            )  # fmt: skip
        return _rows(out)

    def _plan_gather(self, context_lens: Sequence[int]) -> None:
        """KV slots of every cached position of the step, one sequence after the other."""
        device, size = self._kv_slots.device, self._cache.block_size
        contexts = torch.tensor(context_lens, dtype=torch.int64)
        ends = contexts.cumsum(0)
        sequence = torch.arange(len(contexts)).repeat_interleave(contexts)
        position = torch.arange(len(sequence)) - (ends - contexts)[sequence]
        sequence, position = to_device(sequence, device), to_device(position, device)
        self._gathered = self._block_tables[sequence, position // size].long() * size + position % size
        self._key_start = to_device(torch.cat((ends.new_zeros(1), ends)).int(), device)


def _rows(out: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """[T, Hq · D]; a pair is what `varlen_attn` gives to those who ask for more than the result."""
    return (out if isinstance(out, Tensor) else out[0]).flatten(1)
