"""Weights from safetensors into a frozen `Decoder`, tensor by tensor, each of them checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tenora.errors import ConfigurationError, UnsupportedModelError
from tenora.model.decoder import Decoder
from tenora.model.packed import PackedLinear, can_pack, pack_stack
from tenora.model.projection import Projection
from tenora.model.spec import SUPPORTED, ModelSpec, read_json
from tenora_kernels.cpu.precompile import Wanted
from tenora_kernels.cpu.products.gemm import PackedMatrix
from tenora_kernels.cpu.runtime.team import Team

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_USUAL_HEAD_DIM = 64
_FLOATS = frozenset({"BF16", "F16", "F32"})  # as safetensors spells them


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
    with ExitStack() as stack:
        tensors = {name: file for file in _open_files(directory, stack) for name in file.keys()}  # noqa: SIM118  # not a dict
        plan = list(_plan(spec))
        _check(directory, spec, plan, tensors)
        decoder = Decoder(spec, dtype=dtype, device=device)  # memory that nobody has touched yet costs nothing
        packs = team is not None and decoder.device.type == "cpu" and dtype == torch.float32 and can_pack(spec)
        narrow = packs and all(_kind(tensors, piece) == "BF16" for piece in plan if len(piece.shape) == 2)
        matrices: dict[str, PackedMatrix] = {}
        pieces_of: dict[str, list[_Piece]] = {}
        for piece in plan:
            pieces_of.setdefault(piece.parameter, []).append(piece)
        placed, total = 0, sum(prod(piece.shape) for piece in plan)
        for name, pieces in pieces_of.items():
            target: Tensor = decoder.get_parameter(name)
            packed = packs and target.dim() == 2 and not name.endswith("qk_norm.weight")
            if packed and narrow:
                target = torch.empty(target.shape, dtype=torch.bfloat16)
            for piece in pieces:
                target[piece.rows].copy_(tensors[piece.source].get_tensor(piece.source).expand_as(target[piece.rows]))
            if packed:
                matrices[name] = PackedMatrix.pack(target)
                _drop(decoder, name)
            placed += sum(prod(piece.shape) for piece in pieces)
            report(placed, total)
        decoder.team = team
        if team is not None and matrices:
            _attach(decoder, matrices, team)
    return decoder.eval()


def wanted_kernels(directory: Path | None, dtype: torch.dtype, *, train: bool) -> Wanted:
    """What a base in a directory asks of the CPU's kernels; without one, what a bfloat16 base of the usual sizes does.

    Raises:
        UnsupportedModelError: as `load_decoder`.
    """
    if directory is None:
        return Wanted(dtype, dtype == torch.float32, True, _USUAL_HEAD_DIM, train)
    spec = ModelSpec.from_directory(directory)
    packed = dtype == torch.float32 and can_pack(spec)
    with ExitStack() as stack:
        tensors = {name: file for file in _open_files(directory, stack) for name in file.keys()}  # noqa: SIM118  # not a dict
        matrices = [piece for piece in _plan(spec) if len(piece.shape) == 2]
        narrow = packed and all(piece.source in tensors and _kind(tensors, piece) == "BF16" for piece in matrices)
    return Wanted(dtype, packed, narrow, spec.head_dim, train)


def _kind(tensors: dict[str, Any], piece: _Piece) -> str:
    """The type of a tensor as its file spells it."""
    return str(tensors[piece.source].get_slice(piece.source).get_dtype())


def _drop(decoder: Decoder, name: str) -> None:
    """Free a weight that was packed."""
    owner, _, attribute = name.rpartition(".")
    setattr(decoder.get_submodule(owner), attribute, None)


def _attach(decoder: Decoder, matrices: dict[str, PackedMatrix], team: Team) -> None:
    """Give the packed matrices to the modules and to the stack."""
    for name, module in decoder.named_modules():
        if isinstance(module, Projection):
            module.packed = PackedLinear(matrices[f"{name}.weight"], team)
    _drop(decoder, "lm_head")
    decoder.stack = pack_stack(decoder, matrices, team)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A tensor of the checkpoint, its shape there, and the rows of our parameter that it fills."""

    source: str
    shape: tuple[int, ...]
    parameter: str
    rows: slice


def _plan(spec: ModelSpec) -> Iterator[_Piece]:
    """Every tensor that the checkpoint must hold."""
    hidden, everything = spec.hidden_size, slice(None)
    yield _Piece("model.embed_tokens.weight", (spec.vocab_size, hidden), "embed_tokens", everything)
    yield _Piece("model.norm.weight", (hidden,), "norm.weight", everything)
    if not spec.tie_word_embeddings:
        yield _Piece("lm_head.weight", (spec.vocab_size, hidden), "lm_head", everything)
    for layer in range(spec.num_layers):
        yield from _layer_plan(spec, layer)


def _layer_plan(spec: ModelSpec, layer: int) -> Iterator[_Piece]:
    theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
    hidden, q, kv, mlp = spec.hidden_size, spec.q_size, spec.kv_size, spec.intermediate_size
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield _Piece(f"{theirs}.{norm}.weight", (hidden,), f"{ours}.{norm}.weight", slice(None))
    if spec.qk_norm:
        heads = spec.num_heads
        for name, rows in (("q_norm", slice(0, heads)), ("k_norm", slice(heads, None))):
            yield _Piece(
                f"{theirs}.self_attn.{name}.weight", (spec.head_dim,), f"{ours}.self_attn.qk_norm.weight", rows
            )
    groups = (
        ("self_attn", "qkv_proj", hidden, {"q_proj": q, "k_proj": kv, "v_proj": kv}, spec.attention_bias),
        ("self_attn", "o_proj", q, {"o_proj": hidden}, spec.o_bias),
        ("mlp", "gate_up_proj", hidden, {"gate_proj": mlp, "up_proj": mlp}, spec.mlp_bias),
        ("mlp", "down_proj", mlp, {"down_proj": hidden}, spec.mlp_bias),
    )
    for block, fused, in_features, members, bias in groups:
        start = 0
        for member, size in members.items():
            rows = slice(start, start + size)
            source, parameter = f"{theirs}.{block}.{member}", f"{ours}.{block}.{fused}"
            yield _Piece(f"{source}.weight", (size, in_features), f"{parameter}.weight", rows)
            if bias:
                yield _Piece(f"{source}.bias", (size,), f"{parameter}.bias", rows)
            start += size


def _open_files(directory: Path, stack: ExitStack) -> list[Any]:
    """Open the checkpoint's files (mapped, not read) until `stack` closes."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        if any(Path(name).name != name for name in names):
            raise UnsupportedModelError(f"{index} names files outside of its directory.")
    else:
        names = ["model.safetensors"]
    files = []
    for name in names:
        path = directory / name
        if not path.is_file():
            raise UnsupportedModelError(
                f"{path} is missing; a base model needs its weights as safetensors (model.safetensors or shards with "
                "model.safetensors.index.json)."
            )
        try:
            files.append(stack.enter_context(safe_open(path, framework="pt", device="cpu")))
        except (SafetensorError, OSError) as error:
            raise UnsupportedModelError(
                f"{path} is not a complete safetensors file ({error}); fetch it again."
            ) from error
    return files


def _check(directory: Path, spec: ModelSpec, plan: list[_Piece], tensors: dict[str, Any]) -> None:
    for piece in plan:
        if piece.source not in tensors:
            raise _mismatch(directory, f"the tensor {piece.source} is missing")
        stored = tensors[piece.source].get_slice(piece.source)
        if tuple(stored.get_shape()) != piece.shape:
            raise _mismatch(directory, f"{piece.source} has shape {stored.get_shape()}, not {list(piece.shape)}")
        if stored.get_dtype() not in _FLOATS:
            raise _mismatch(directory, f"{piece.source} has type {stored.get_dtype()}, so it is quantised")
    unexpected = set(tensors) - {piece.source for piece in plan}
    # Old checkpoints carry the RoPE buffers; they follow from the configuration.
    unexpected -= {name for name in unexpected if name.endswith("rotary_emb.inv_freq")}
    if spec.tie_word_embeddings and "lm_head.weight" in unexpected:
        # Some tied checkpoints repeat the embeddings; another matrix would contradict the configuration.
        head, table = (tensors[name].get_tensor(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
        if not _equal(head, table):
            raise _mismatch(directory, "lm_head.weight differs from the embeddings though tie_word_embeddings is true")
        unexpected.discard("lm_head.weight")
    if unexpected:
        raise _mismatch(directory, f"the tensor {min(unexpected)} is not part of a {spec.family} model")


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and bool(torch.equal(first, second))


def _mismatch(directory: Path, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"The weights in {directory} do not fit its config.json: {reason}. {SUPPORTED}")


def _cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bfloat16 dot products (AVX512-BF16, AMX, or Arm's BF16)."""
    probe = getattr(torch.cpu, "get_capabilities", None)
    if probe is None:  # an older torch cannot tell; float32 is right everywhere, only slower on such a CPU
        return False
    capabilities = probe()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "amx_tile", "bf16"))
