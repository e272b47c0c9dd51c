"""Logits of a base with the adapter of a directory, by the module path; and PEFT's of the same directory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor

from tenora.adapters.peft_format import read_adapter
from tenora.adapters.pool import SlotPool
from tenora.adapters.prepared import prepare
from tenora.adapters.weights import AdapterWeights
from tenora.model.attention import PackedAttention
from tenora.model.context import ForwardContext
from tenora.model.decoder import Decoder
from tenora.model.magnitudes import RowNorms, with_scales
from tenora.model.spec import table_rows
from tenora_kernels.layout import LoraBatch, build_segments
from tests.support.tiny import VOCAB

IDS = torch.randint(3, VOCAB, (23,), generator=torch.Generator().manual_seed(7))


def read(decoder: Decoder, directory: Path) -> AdapterWeights:
    return read_adapter(directory, table_rows(decoder.spec), max_rank=64)


@torch.no_grad()
def our_logits(decoder: Decoder, directory: Path | None, ids: Tensor = IDS) -> Tensor:
    """In a batch with rows of the base before and behind."""
    lengths = [5, len(ids), 4]
    lora = None
    if directory is not None:
        rows = table_rows(decoder.spec)
        weights = with_scales(read(decoder, directory), rows, RowNorms(decoder))
        pool = SlotPool(rows, max_slots=2, max_bytes=2**20, dtype=decoder.dtype, device=decoder.device)
        pool.insert("a", prepare(weights, rows, dtype=decoder.dtype, device=decoder.device))
        slot = pool.acquire("a")
        assert slot is not None
        lora = LoraBatch(pool.tables, build_segments([-1] * 5 + [slot] * len(ids) + [-1] * 4))
    positions = torch.cat([torch.arange(length) for length in lengths])
    context = ForwardContext(
        positions=positions,
        rope=decoder.rope(positions, torch.tensor(lengths).repeat_interleave(torch.tensor(lengths))),
        attention=PackedAttention(list(accumulate(lengths, initial=0))),
        lora=lora,
    )
    stream = torch.cat([ids[:5], ids, ids[:4]])
    return decoder.logits(decoder(stream, context))[5 : 5 + len(ids)]


def base_model(directory: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def save_random(base: Path, config: peft.PeftConfig, directory: Path, wanted: Callable[[str], bool]) -> None:
    """A PEFT adapter, with random values in its parameters that are `wanted` by name."""
    model = peft.get_peft_model(base_model(base), config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if wanted(name):
            noise = torch.randn(parameter.shape, generator=generator)
            # Vectors are factors, around 1; matrices are added.
            parameter.data = 1 + 0.4 * noise if 1 in (*parameter.shape, parameter.dim()) else 0.3 * noise
    model.save_pretrained(directory)


@torch.no_grad()
def peft_logits(base: Path, directory: Path, ids: Tensor = IDS) -> Tensor:
    """What PEFT misses in the files, or finds beside, is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        model = peft.PeftModel.from_pretrained(base_model(base), directory)
    return model(ids[None]).logits[0][-len(ids) :]  # PEFT gives those of a prompt's virtual tokens, too
