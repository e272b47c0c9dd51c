"""Every launch of the GPU backend, recorded instead of run: the real launch functions on tensors without memory.

What is compiled ahead of time is so what a device would compile, argument for argument: types, divisibility, constants.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from tenora_kernels.gpu import backend, configs, launch, paged, parts, tables
from tenora_kernels.gpu.context import GpuLora
from tenora_kernels.layout import BottleneckSite, LoraSite, LoraTables

_KERNELS = {
    launch: ("shrink", "expand", "expand_joint", "lora_wgrad"),
    tables: ("sort_rows", "find_tiles"),
    parts: ("scale", "choose_input", "activate", "add_outer"),
    paged: ("paged_decode", "combine_decode", "write_kernel"),
}


@dataclass(frozen=True)
class Launch:
    """One kernel with the arguments that decide its machine code.

    Attributes:
        name: of the kernel.
        label: what it was launched for.
        kernel: the Triton function.
        signature: type of each argument.
        constants: value of each argument that is a constant.
        divisible: indices of the arguments that are multiples of 16.
        options: warps and stages.
    """

    name: str
    label: str
    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def title(self) -> str:
        return f"{self.name}, {self.label}"

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.name, self.signature, self.constants, self.divisible, self.options)


def name_of(dtype: torch.dtype) -> str:
    """As it is written in a title."""
    return str(dtype).removeprefix("torch.")


_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Recorder:
    """Stands in for a kernel: `recorder[grid](*args, **kwargs)` appends a `Launch`."""

    def __init__(self, kernel: Any, label: str, log: list[Launch]) -> None:
        self.kernel, self.label, self.log = kernel, label, log

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(size > 0 for size in grid), f"an empty grid for {self.kernel.__name__}"
        return self._record

    def _record(self, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages", "launch_pdl") if name in kwargs}
        signature, constants, divisible = {}, {}, []
        values = dict(zip([p.name for p in self.kernel.params], args, strict=False)) | kwargs
        for i, parameter in enumerate(self.kernel.params):
            value = values[parameter.name]
            signature[parameter.name], constant, aligned = _classify(value, parameter)
            if constant:
                constants[parameter.name] = value
            if aligned:
                divisible.append(i)
        self.log.append(
            Launch(
                self.kernel.__name__,
                self.label,
                self.kernel,
                tuple(signature.items()),
                tuple(constants.items()),
                tuple(divisible),
                tuple(options.items()),
            )
        )


def _classify(value: Any, parameter: Any) -> tuple[str, bool, bool]:
    """(type, is constant, is a multiple of 16), as Triton's own specialisation has it."""
    if parameter.is_constexpr:
        return "constexpr", True, False
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype], False, True
    assert isinstance(value, int)
    assert not isinstance(value, bool)
    if parameter.do_not_specialize:
        return "i32", False, False
    if value == 1:
        return "constexpr", True, False
    return "i32", False, value % 16 == 0


@contextmanager
def recording(label: str, arch: configs.Arch) -> Iterator[list[Launch]]:
    """Launches of the block, recorded for `arch`."""
    log: list[Launch] = []
    with (
        mock.patch.object(configs, "arch_of", return_value=arch),
        mock.patch.object(configs, "interpreted", return_value=False),
    ):
        patches = [
            mock.patch.object(module, name, Recorder(getattr(module, name), label, log))
            for module, names in _KERNELS.items()
            for name in names
        ]
        for patch in patches:
            patch.start()
        try:
            yield log
        finally:
            for patch in patches:
                patch.stop()


@dataclass(frozen=True)
class Model:
    """Widths of one layer: q, k, v, o, gate, up, down."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def sites(self) -> dict[str, LoraSite]:
        q, k, v, _, gate, up, _ = self.outputs
        hidden = self.inputs[0]
        return {
            "qkv": LoraSite(0, hidden, ((0, q), (q, q + k), (q + k, q + k + v))),
            "gate_up": LoraSite(4, hidden, ((0, gate), (gate, gate + up))),
            "down": LoraSite(6, self.inputs[6], ((0, self.outputs[6]),)),
        }


LLAMA_8B = Model("8B", (4096,) * 6 + (14336,), (4096, 1024, 1024, 4096, 14336, 14336, 4096))
ODD = Model("odd", (40,) * 6 + (72,), (40, 24, 24, 40, 72, 72, 40))  # nothing is a multiple of 16
SMOL = Model("135M", (576,) * 6 + (1536,), (576, 192, 192, 576, 1536, 1536, 576))


@dataclass(frozen=True)
class OperandTypes:
    """Types of a backward pass: dY, x, the weights that are read, their gradient, dX."""

    dy: torch.dtype
    x: torch.dtype
    weights: torch.dtype
    grad: torch.dtype
    dx: torch.dtype


TRAINED = OperandTypes(torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)
"""Those that the service trains with on a bfloat16 base (`tests/training/test_arena.py` looks)."""


def _attend(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    """One layer's decode attention of 32 rows with up to 8,192 tokens each, on what a CUDA graph is captured over."""
    q, k, v = torch.empty(32, heads + 2 * kv_heads, dim, dtype=dtype, device="meta").split(
        (heads, kv_heads, kv_heads), 1
    )
    cache = torch.empty(64, 16, kv_heads, dim, dtype=dtype, device="meta")
    fields = torch.empty(5 + 512, 32, dtype=torch.int32, device="meta")
    paged.write_pages(cache, cache, fields[2], k, v)
    paged.attend_pages(q, cache, cache, fields[5:].t(), fields[3], None)


LOW_RANK = ("sort_rows", "find_tiles", "shrink", "expand", "expand_joint", "lora_wgrad")
PAGED = ("paged_decode", "combine_decode", "write_pages")
PARTS = ("scale", "choose_input", "activate", "add_outer")
EVERYTHING = LOW_RANK + PAGED + PARTS

# Query heads, key heads, columns of a head: Llama-3-8B, SmolLM2-135M, Gemma-like, Phi-3, and one key head for 32.
_HEADS = ((32, 8, 128), (9, 3, 64), (8, 4, 256), (32, 32, 96), (32, 1, 128))


@dataclass(frozen=True)
class Product:
    """A low-rank product that is launched.

    Attributes:
        rank: the highest of the pool.
        rows: of the batch, which decide on decode or prefill tiles.
        dtype: of x and y.
        weights: of the arena; None: the same. With another type its products run on no tensor core.
        backward: the backward pass, with gradients of the weights, instead of the forward pass.
        kernels: those of its launches that are compiled.
    """

    model: Model
    site: str
    rank: int
    rows: int
    dtype: torch.dtype = torch.bfloat16
    weights: torch.dtype | None = None
    backward: bool = False
    kernels: tuple[str, ...] = LOW_RANK

    @property
    def label(self) -> str:
        kind = "decode" if self.rows <= configs.DECODE_ROWS else "prefill"
        if self.backward:
            kind = "backward" if kind == "prefill" else "backward, few rows,"
        on = "" if self.weights is None else f" on {name_of(self.weights)}"
        return f"{kind} {self.model.name} {self.site} r{self.rank} {name_of(self.dtype)}{on}"

    def launch(self) -> None:
        """Launch it on tensors without memory."""
        model, rows, site = self.model, self.rows, self.model.sites()[self.site]
        arena = torch.empty(1 << 20, dtype=self.weights or self.dtype, device="meta")
        grad = torch.empty(1 << 20, dtype=TRAINED.grad, device="meta") if self.backward else None
        lora_tables = LoraTables.empty(arena, in_features=model.inputs, out_features=model.outputs, slots=64, grad=grad)
        x = torch.empty(rows, site.in_features, dtype=self.dtype, device="meta")
        y = torch.empty(rows, site.slices[-1][1], dtype=self.dtype, device="meta")
        batch = GpuLora(lora_tables, max_rows=rows, max_rank=self.rank).batch(
            torch.empty(rows, dtype=torch.int32, device="meta")
        )
        if self.backward:
            dx = torch.empty(rows, site.in_features, dtype=TRAINED.dx, device="meta")
            backend.backward(y, x, site, batch, dx)
            return
        backend.forward(y, x, site, batch)


def _products() -> Iterator[Product]:
    """Every entry of the tables in `configs` once."""
    for rank in (16, 64):
        for rows in (32, 2048):
            yield Product(LLAMA_8B, "qkv", rank, rows)
            yield Product(LLAMA_8B, "qkv", rank, rows, backward=True)
        yield Product(SMOL, "qkv", rank, 32)
    yield Product(LLAMA_8B, "down", 16, 32, kernels=("shrink", "expand"))  # most planes
    for rows in (32, 2048):
        yield Product(ODD, "qkv", 16, rows, kernels=("shrink", "expand"))
    for dtype in (torch.float16, torch.float32):
        for rows in (32, 2048):
            yield Product(LLAMA_8B, "qkv", 64, rows, dtype)
        yield Product(LLAMA_8B, "qkv", 64, 2048, dtype, backward=True)
    # Nothing in the service mixes its types so, but `add_lora` takes it.
    for rows in (32, 2048):
        yield Product(LLAMA_8B, "qkv", 16, rows, weights=torch.float32)
    yield Product(LLAMA_8B, "qkv", 16, 2048, weights=torch.float32, backward=True)


def _parts(model: Model, rows: int, dtype: torch.dtype, *, biased: bool) -> None:
    """Scales at the site of q, k and v, and a bottleneck of rank 64 after a block."""
    site, hidden = model.sites()["qkv"], model.inputs[0]
    wide = site.slices[-1][1]
    widths = [stop - start for start, stop in site.slices]
    arena = torch.empty(1 << 20, dtype=dtype, device="meta")
    lora_tables = LoraTables.empty(
        arena,
        in_features=(hidden, hidden, hidden, hidden, *widths, hidden, 1),
        out_features=(*widths, hidden, 0, 0, 0, 0, 0),
        slots=64,
        low_rank_rows=4,
    )
    slots = torch.empty(rows, dtype=torch.int32, device="meta")
    batch = GpuLora(lora_tables, max_rows=rows, max_rank=64).batch(slots)
    y = torch.empty(rows, wide, dtype=dtype, device="meta")
    bias = torch.empty(wide, dtype=dtype, device="meta") if biased else None
    parts.scale_forward(y, LoraSite(0, hidden, site.slices, scale_row=4), batch, bias)
    y, x = (torch.empty(rows, hidden, dtype=dtype, device="meta") for _ in range(2))
    parts.bottleneck_forward(y, x, BottleneckSite(row=3, outer_row=7, inner_row=8, features=hidden), batch)


def all_launches(arch: configs.Arch) -> list[Launch]:
    """Every kernel in every configuration of the tables, once each."""
    found: dict[Any, Launch] = {}
    for product in _products():
        with recording(product.label, arch) as log:
            product.launch()
        for item in log:
            if item.name in product.kernels:
                found.setdefault(item.key, item)
    for (heads, kv_heads, dim), dtype in itertools.product(_HEADS, (torch.bfloat16, torch.float16, torch.float32)):
        with recording(f"decode {heads}/{kv_heads} x {dim} {name_of(dtype)}", arch) as log:
            _attend(heads, kv_heads, dim, dtype)
        for item in log:
            found.setdefault(item.key, item)
    for dtype, rows in itertools.product((torch.bfloat16, torch.float16, torch.float32), (32, 2048)):
        biased = rows == 32
        kind = "decode" if rows <= configs.DECODE_ROWS else "prefill"
        with recording(f"{kind} 8B parts {name_of(dtype)}", arch) as log:
            _parts(LLAMA_8B, rows, dtype, biased=biased)
        for item in log:
            if item.name in PARTS:
                found.setdefault(item.key, item)
    launches = list(found.values())
    assert len({item.title for item in launches}) == len(launches), "two configurations have one title"
    return launches
