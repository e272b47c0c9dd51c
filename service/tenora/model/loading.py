"""A frozen `Decoder` from a checkpoint: which kind holds each matrix, and where every tensor goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from tenora.errors import ConfigurationError
from tenora.model.checkpoint import Checkpoint
from tenora.model.decoder import Decoder
from tenora.model.layout import Matrix
from tenora.model.spec import ModelSpec
from tenora.model.stack import can_pack, pack_stack
from tenora.model.weights.base import FLOATS, Kind, Place, Stored, Weight
from tenora.model.weights.kinds import kind_of
from tenora.model.weights.packed import Packed
from tenora_kernels.cpu.precompile import Wanted
from tenora_kernels.cpu.runtime.team import Team

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_USUAL_HEAD_DIM = 64


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA if there is one, else the CPU.

    Raises:
        ConfigurationError: a device that this machine or this build of torch lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigurationError("The device 'cuda' is not available here; use --device cpu or install torch for CUDA.")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it, else float32 (CPU) or float16 (CUDA).

    Without native instructions a CPU emulates bfloat16 products: about nine times slower than float32 with AVX2 alone.

    Raises:
        ConfigurationError: an unknown name.
    """
    if name != "auto":
        if name not in _DTYPES:
            raise ConfigurationError(f"The dtype {name!r} is not one of auto, {', '.join(_DTYPES)}.")
        return _DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if _cpu_multiplies_bf16() else torch.float32


def _silent(done: int, total: int) -> None:
    """Report nothing."""


def load_decoder(
    directory: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    team: Team | None = None,
    report: Callable[[int, int], None] = _silent,
) -> Decoder:
    """Load a Hugging Face directory (`config.json` and one or several safetensors files).

    The files are memory-mapped and every tensor is copied once, into its place in a fused weight; bfloat16 and float16
    weights are exact in float32.

    `team` is who computes on a CPU. With one, a decoder that computes in float32 there gets its matrices packed, if its
    sizes allow it: bfloat16 weights then stay bfloat16 in memory, and the results are those of float32 ones.

    `report` is told again and again how many of the weights' numbers are in their places, and how many there are.

    Raises:
        UnsupportedModelError: the configuration is unsupported, or a tensor is missing, unexpected, of another shape
            or quantised; the message names it.
    """
    spec = ModelSpec.from_directory(directory)
    device = torch.device(device)
    with Checkpoint.open(directory) as checkpoint:
        packed = None
        if team is not None and device.type == "cpu":
            packed = _packed_type(spec, checkpoint.types, dtype)
        weights = Reader(checkpoint, Place(device, dtype, team, packed), report)
        others = list(vectors(spec))
        wanted = [*weights.wanted(matrices(spec)), *(stored for stored, _, _ in others)]
        checkpoint.check(spec, wanted)
        weights.total = sum(prod(stored.shape) for stored in wanted)
        decoder = Decoder(spec, dtype=dtype, device=device, read=weights.read)
        for stored, parameter, rows in others:
            target = decoder.get_parameter(parameter)[rows]
            target.copy_(weights.tensor(stored.name).expand_as(target))
        weights.report()
    decoder.team = team
    if team is not None and packed is not None:
        decoder.stack = pack_stack(decoder, team)
    return decoder.eval()


class Reader:
    """Reads the decoder's matrices, and counts the numbers that are read.

    Attributes:
        total: how many there are.
    """

    def __init__(self, checkpoint: Checkpoint, place: Place, report: Callable[[int, int], None]) -> None:
        self._checkpoint, self._place, self._report = checkpoint, place, report
        self._placed = self.total = 0

    def wanted(self, matrices: Iterable[Matrix]) -> Iterator[Stored]:
        """What the checkpoint must hold of them."""
        for matrix in matrices:
            yield from self._kind(matrix).tensors(matrix)

    def read(self, matrix: Matrix) -> Weight:
        """The matrix, as its kind holds it."""
        weight = self._kind(matrix).read(matrix, self.tensor, self._place)
        self.report()
        return weight

    def tensor(self, name: str) -> Tensor:
        """A tensor of the checkpoint, on the CPU."""
        tensor = self._checkpoint.tensor(name)
        self._placed += tensor.numel()
        return tensor

    def report(self) -> None:
        """Say how far it is."""
        self._report(self._placed, self.total)

    def _kind(self, matrix: Matrix) -> Kind:
        return kind_of(matrix, self._checkpoint.types, self._place)


def wanted_kernels(directory: Path | None, dtype: torch.dtype, *, train: bool) -> Wanted:
    """What a base in a directory asks of the CPU's kernels; without one, what a bfloat16 base of the usual sizes does.

    Raises:
        UnsupportedModelError: as `load_decoder`.
    """
    if directory is None:
        return Wanted(dtype, dtype == torch.float32, True, _USUAL_HEAD_DIM, train)
    spec = ModelSpec.from_directory(directory)
    with Checkpoint.open(directory) as checkpoint:
        packed = _packed_type(spec, checkpoint.types, dtype)
    return Wanted(dtype, packed is not None, packed == torch.bfloat16, spec.head_dim, train)


def _packed_type(spec: ModelSpec, types: Mapping[str, str], dtype: torch.dtype) -> torch.dtype | None:
    """The element type of packed matrices on a CPU that computes in `dtype`; None if they are not packed there.

    Matrices of bfloat16 stay so if all of them are.
    """
    if dtype != torch.float32 or not can_pack(spec):
        return None
    found = [types.get(stored.name) for matrix in matrices(spec) for stored in Packed.tensors(matrix)]
    if not all(kind in FLOATS or kind is None for kind in found):
        return None
    return torch.bfloat16 if all(kind == "BF16" for kind in found) else torch.float32


def matrices(spec: ModelSpec) -> Iterator[Matrix]:
    """Every matrix of the decoder."""
    layout = spec.layout
    yield from dict.fromkeys((spec.embedding, spec.head))
    for layer in range(spec.num_layers):
        for block in layout.blocks:
            for site in block.sites:
                yield layout.matrix(layer, block, site)


def vectors(spec: ModelSpec) -> Iterator[tuple[Stored, str, slice]]:
    """Every other tensor of the checkpoint, the parameter of ours that it is part of, and its rows there."""
    layout, everything = spec.layout, slice(None)
    yield Stored(f"{layout.norm}.weight", (spec.hidden_size,)), "norm.weight", everything
    for layer in range(spec.num_layers):
        for index, block in enumerate(layout.blocks):
            norm = Stored(f"{layout.path(layer, block.norm)}.weight", (spec.hidden_size,))
            yield norm, f"layers.{layer}.norms.{index}.weight", everything
            ours, start = f"layers.{layer}.blocks.{index}", 0
            for name, heads in block.head_norms:
                stored = Stored(f"{layout.path(layer, block.name, name)}.weight", (spec.head_dim,))
                yield stored, f"{ours}.head_norm.weight", slice(start, start + heads)
                start += heads
            for site in block.sites:
                for module, (first, stop) in zip(site.modules, site.slices, strict=True) if site.bias else ():
                    bias = Stored(f"{layout.path(layer, block.name, module.name)}.bias", (module.output,))
                    yield bias, f"{ours}.{site.name}.bias", slice(first, stop)


def _cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bfloat16 dot products (AVX512-BF16, AMX, or Arm's BF16)."""
    probe = getattr(torch.cpu, "get_capabilities", None)
    if probe is None:  # an older torch cannot tell; float32 is right everywhere, only slower on such a CPU
        return False
    capabilities = probe()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "amx_tile", "bf16"))
