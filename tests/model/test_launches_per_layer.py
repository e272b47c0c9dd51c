"""How many launches a layer of a decode step is on a GPU, counted by dispatch on tensors without memory.

A launch in a captured graph costs about two microseconds, a step of 32 layers has that many times this number: it may
fall, and the table below falls with it; it must not grow unseen.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tenora.model import pages
from tenora.model.attention import paged_attention
from tenora.model.cache import KVCache
from tenora.model.context import ForwardContext
from tenora.model.decoder import Decoder
from tenora.model.spec import ModelSpec, target_modules
from tenora_kernels import ops
from tenora_kernels.gpu import backend, paged
from tenora_kernels.gpu.context import GpuLora
from tenora_kernels.layout import LoraTables
from tests.kernels.gpu.launches import recording

ROWS, META = 32, torch.device("meta")
GEMMS, ATTENTION, LOW_RANK = 4, 3, 2 * 4
"""Products with the base; the write of keys and values, attention and the sum of its splits; two per adapted group."""
ELEMENTWISE = {"llama": 25, "mistral": 25, "qwen2": 25, "qwen3": 33}
"""Everything else: two RMSNorms, the rotation of heads, the gate, two sums."""

# Bookkeeping of the host: a view, or memory that nobody fills.
_FREE = {
    "view", "reshape", "split", "slice", "select", "unsqueeze", "expand", "transpose", "unbind", "detach", "alias", "t",
    "empty", "new_empty",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts the operations that run something on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.strip("_").removeprefix("unsafe_")
        if name not in _FREE and name.split("_")[0] not in _FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def spec_of(family: str, layers: int) -> ModelSpec:
    """8B's widths."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": layers, "vocab_size": 1024}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "head_dim": 128}
    return ModelSpec.from_config({"model_type": family, "rms_norm_eps": 1e-5, **sizes, **heads})


def launched(
    family: str, layers: int, *, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], list[str]]:
    """Operations of torch and launches of our kernels in a decode step of all layers."""
    monkeypatch.setattr(pages, "_kernels_for", lambda _: paged)
    monkeypatch.setattr(ops, "select_backend", lambda *_: backend)
    spec = spec_of(family, layers)
    decoder = Decoder(spec, dtype=torch.bfloat16, device=META)
    cache = KVCache.allocate(spec, 64, 16, dtype=torch.bfloat16, device=META)

    def numbers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    targets = target_modules(spec)
    tables = LoraTables.empty(
        numbers(1 << 20, dtype=torch.bfloat16),
        in_features=[target.in_features for target in targets],
        out_features=[target.out_features for target in targets],
        slots=64,
    )
    rope = (numbers(ROWS, spec.head_dim, dtype=torch.bfloat16), numbers(ROWS, spec.head_dim, dtype=torch.bfloat16))
    with recording("step", "sm90") as ours, torch.no_grad():
        lora = GpuLora(tables, max_rows=ROWS, max_rank=16).batch(numbers(ROWS), flags=0) if adapted else None
        attention = paged_attention(cache, numbers(ROWS), None, numbers(ROWS), numbers(ROWS, 64))
        context = ForwardContext(numbers(ROWS, dtype=torch.int64), rope, attention, lora)
        hidden = numbers(ROWS, spec.hidden_size, dtype=torch.bfloat16)
        ours.clear()
        with Launches() as counted:
            for layer in decoder.layers:
                hidden = layer(hidden, context)
    return counted.names, [launch.name for launch in ours]


@pytest.mark.parametrize("family", ELEMENTWISE)
def test_a_layer_of_a_decode_step_is_no_more_launches_than_it_was(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torchs, ours = launched(family, 1, adapted=False, monkeypatch=monkeypatch)
    products = [name for name in torchs if name in {"mm", "addmm", "linear", "matmul"}]
    assert len(products) == GEMMS
    assert len(torchs) - len(products) <= ELEMENTWISE[family], torchs
    assert len(ours) <= ATTENTION, ours


def test_adapters_are_two_launches_a_group_and_nothing_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    bare, kernels = launched("llama", 1, adapted=False, monkeypatch=monkeypatch)
    adapted, with_adapters = launched("llama", 1, adapted=True, monkeypatch=monkeypatch)
    assert adapted == bare
    added = sorted(with_adapters)
    for name in kernels:
        added.remove(name)
    assert added == ["expand"] * 4 + ["shrink"] * 4
    assert len(added) == LOW_RANK


def test_every_layer_is_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (launched("llama", layers, adapted=True, monkeypatch=monkeypatch) for layers in (1, 2))
    assert [len(names) for names in two] == [2 * len(names) for names in one]
