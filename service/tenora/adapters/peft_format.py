"""PEFT LoRA adapters on disk: read with every check first, written so that `PeftModel.from_pretrained` loads them.

Free of torch. An adapter is a directory of `adapter_config.json` and `adapter_model.safetensors`; nothing else in it is
looked at, and nothing that the files refer to (a base path, code, a remote) is followed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from tenora.adapters.arena_room import ArenaRoom
from tenora.adapters.atomic import new_directory
from tenora.adapters.digest import CONFIG_NAME, WEIGHTS_NAME, HashingBeside, content_hasher, damaged, digest_of
from tenora.adapters.foreign_names import PREFIX, foreign_name, unexpected_name
from tenora.adapters.peft_config import MAX_CONFIG_BYTES, parse_config
from tenora.adapters.safetensors_file import (
    Array,
    TensorEntry,
    as_float32,
    parse_header,
    read_array,
    read_arrays,
    read_header_text,
    require_below,
    write_file,
)
from tenora.adapters.targets import TargetModule
from tenora.errors import AdapterFormatError

T = TypeVar("T")

_KEPT_PLANS = 8  # kinds of adapters (ranks, modules, types) whose headers are remembered
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class LoraModule:
    """The adapter of one linear module: delta weight = scaling · B · A.

    Attributes:
        path: `model.layers.0.self_attn.q_proj`.
        scaling: alpha / rank, or alpha / √rank for rsLoRA.
        a: [rank, in_features].
        b: [out_features, rank], as in the file.
        dtype: float32, float16 or bfloat16, of both; bfloat16 arrays are the bits as uint16. What the file has in
            float64, or in two types, is float32, as PEFT loads it.
    """

    path: str
    rank: int
    scaling: float
    a: Array
    b: Array
    dtype: str

    @property
    def bt(self) -> Array:
        """Bᵀ, [rank, out_features], a view."""
        return self.b.T


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """What an adapter is, without its weights.

    Attributes:
        rank: the highest of its modules.
        target_modules: last parts of the paths that it adapts (`q_proj`), in the order of the base.
        parameters: number of weights.
        bfloat16: whether all of them are bfloat16.
        nbytes: size of the weights in the file.
        config: adapter_config.json.
    """

    rank: int
    target_modules: tuple[str, ...]
    parameters: int
    bfloat16: bool
    nbytes: int
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """A whole adapter in memory. `modules` is by path, in the order of the base; the rest is as in AdapterSummary."""

    modules: Mapping[str, LoraModule]
    rank: int
    target_modules: tuple[str, ...]
    config: Mapping[str, Any]
    nbytes: int


class LoraShape(Protocol):
    """The shape of an adapter to write; `tenora.training.spec.LoraSpec` is one."""

    @property
    def rank(self) -> int:
        """Rank of every module that has no other."""

    @property
    def alpha(self) -> float:
        """Numerator of the scaling."""

    @property
    def dropout(self) -> float:
        """Dropout it was trained with."""

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Last parts of module paths; empty: of every module that is written."""

    @property
    def use_rslora(self) -> bool:
        """Whether the scaling is alpha / √rank."""


@dataclass(frozen=True, slots=True)
class _Planned:
    """One module whose shapes were checked; its values were not read yet."""

    target: TargetModule
    rank: int
    scaling: float
    a: TensorEntry
    b: TensorEntry


@dataclass(frozen=True, slots=True)
class _Plan:
    """All that is known without reading a weight: modules in the order of the base, tensors in that of the file."""

    modules: tuple[_Planned, ...]
    entries: tuple[TensorEntry, ...]
    summary: AdapterSummary


class AdapterReader:
    """Reads adapters of one base. Safe to call from several threads.

    Checking a header of hundreds of tensors costs more than reading the weights, and the adapters that one program
    saves differ in nothing but their weights: what was found out about a header is kept for the next equal one.
    """

    def __init__(self, targets: Sequence[TargetModule], *, max_rank: int) -> None:
        """`targets` are the modules of the base that can be adapted, `max_rank` the highest rank that is accepted."""
        self._targets = tuple(targets)
        self._max_rank = max_rank
        self._plans: OrderedDict[bytes, _Plan] = OrderedDict()
        self._hashing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-hashing")

    def read(self, directory: Path) -> AdapterWeights:
        """Read and check the adapter of a directory. Raises as `read_adapter`."""
        return self._read(directory, read_config(directory), None)

    def load(self, directory: Path, digest: str, use: Callable[[AdapterWeights], T]) -> T:
        """What `use` makes of the adapter of a directory, if its bytes are those that a digest names.

        They are hashed on a thread of their own while `use` works, because hashing takes as long as all else together.

        Args:
            directory: as `read_adapter`.
            digest: what its bytes must be (`tenora.adapters.digest`).
            use: gets weights that are not known to be the right ones yet, so nothing that it does may be seen before
                its result is returned. It must not change them.

        Raises:
            AdapterDamagedError: the files are not those that the digest names, or are gone.
            AdapterFormatError, FileNotFoundError: as `read_adapter`.
            What `use` raises.
        """
        try:
            config = read_config(directory)
            hashing = HashingBeside(content_hasher(config), self._hashing)
            made = use(self._read(directory, config, hashing))
        except (AdapterFormatError, FileNotFoundError) as error:
            if digest_of(directory) != digest:
                raise damaged(digest) from error
            raise
        if hashing.hexdigest() != digest:
            raise damaged(digest)
        return made

    def _read(self, directory: Path, config: bytes, hashing: HashingBeside | None) -> AdapterWeights:
        with _open_weights(directory / WEIGHTS_NAME) as file:
            header, file_size = _header(config, file)
            plan = self._plan(config, header, file_size)
            if hashing is not None:
                hashing.update(len(header).to_bytes(8, "little") + header)
            found = read_arrays(file, plan.entries, None if hashing is None else hashing.update)
            arrays = dict(zip((entry.name for entry in plan.entries), found, strict=True))
        modules = {planned.target.path: _module(planned, arrays) for planned in plan.modules}
        summary = plan.summary
        return AdapterWeights(modules, summary.rank, summary.target_modules, summary.config, summary.nbytes)

    def _plan(self, config: bytes, header: bytes, file_size: int) -> _Plan:
        # SHA-256, because a tenant that could make two files collide could have one checked and another one served.
        key = hashlib.sha256(b"%d %d " % (len(config), file_size) + config + header).digest()
        plan = self._plans.get(key)
        if plan is None:
            plan = _plan(config, header, file_size, self._targets, self._max_rank)
            self._plans[key] = plan
            while len(self._plans) > _KEPT_PLANS:
                self._plans.popitem(last=False)
        return plan


def read_adapter(directory: Path, targets: Sequence[TargetModule], *, max_rank: int) -> AdapterWeights:
    """Read and check an adapter.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors.
        targets: the modules of the base that can be adapted.
        max_rank: highest rank that is accepted.

    Raises:
        AdapterFormatError: if anything about it is not as it must be; the message names the tensor or field.
        FileNotFoundError: if the directory does not exist.
    """
    return AdapterReader(targets, max_rank=max_rank).read(directory)


def summarise(directory: Path, targets: Sequence[TargetModule], *, max_rank: int) -> AdapterSummary:
    """What the adapter of a directory is. No weight is read. Raises as `read_adapter`."""
    config = read_config(directory)
    with _open_weights(directory / WEIGHTS_NAME) as file:
        return _plan(config, *_header(config, file), targets, max_rank).summary


def validate_files(
    config: bytes, weights: Path, targets: Sequence[TargetModule], *, max_rank: int, room: ArenaRoom | None = None
) -> AdapterSummary:
    """Check an upload exactly as `read_adapter` does, holding one tensor in memory at a time.

    Args:
        config: content of adapter_config.json.
        weights: the safetensors file, under any name.
        targets: the modules of the base that can be adapted.
        max_rank: highest rank that is accepted.
        room: where it is to be served.

    Raises:
        AdapterFormatError: as `read_adapter`, or it does not fit the room, or a weight is too large for its type.
    """
    with _open_weights(weights) as file:
        plan = _plan(config, *_header(config, file), targets, max_rank)
        summary = plan.summary
        if room is not None:
            room.require(room.bytes_of(summary.parameters, bfloat16=summary.bfloat16))
        largest = math.inf if room is None else room.largest
        for entry in plan.entries:
            require_below(largest, entry, read_array(file, entry))
    return summary


def read_config(directory: Path) -> bytes:
    """The bytes of a directory's adapter_config.json, at most MAX_CONFIG_BYTES + 1 of them."""
    path = directory / CONFIG_NAME
    if directory.is_dir() and not path.is_file():
        raise AdapterFormatError(f"{CONFIG_NAME} is missing; give the directory that save_pretrained wrote.")
    with path.open("rb") as file:
        return file.read(MAX_CONFIG_BYTES + 1)


def _open_weights(path: Path) -> BinaryIO:
    if path.is_file():
        return path.open("rb")
    if path.with_name("adapter_model.bin").exists():
        raise AdapterFormatError(
            "adapter_model.bin is a pickle, which is never opened; save the adapter with safe_serialization=True."
        )
    raise AdapterFormatError(f"{WEIGHTS_NAME} is missing; give the directory that save_pretrained wrote.")


def _header(config: bytes, file: BinaryIO) -> tuple[bytes, int]:
    """`read_header_text`; but what is wrong with the configuration is told first."""
    try:
        return read_header_text(file)
    except AdapterFormatError:
        parse_config(config)
        raise


def _plan(config: bytes, header: bytes, file_size: int, targets: Sequence[TargetModule], max_rank: int) -> _Plan:
    """Everything that can be checked without reading a weight."""
    parsed = parse_config(config)
    covered = parsed.resolve(targets)
    # Two tensors a module; with room for those of other formats, so that a name among them can tell which it is.
    entries = parse_header(header, file_size, max_tensors=4 * len(targets))
    if (reason := foreign_name(entries)) is not None:
        raise AdapterFormatError(reason)
    modules = [
        _planned(target, *covered[target.path], entries, max_rank) for target in targets if target.path in covered
    ]
    expected = {entry.name for planned in modules for entry in (planned.a, planned.b)}
    for name in entries:
        if name not in expected:
            raise AdapterFormatError(unexpected_name(name, {target.path for target in targets}))
    summary = AdapterSummary(
        rank=max(planned.rank for planned in modules),
        target_modules=tuple(dict.fromkeys(planned.target.name for planned in modules)),
        parameters=sum(p.rank * (p.target.in_features + p.target.out_features) for p in modules),
        bfloat16=all(entry.dtype == "BF16" for entry in entries.values()),
        nbytes=sum(planned.a.nbytes + planned.b.nbytes for planned in modules),
        config=parsed.raw,
    )
    return _Plan(tuple(modules), tuple(entries.values()), summary)


def _planned(
    target: TargetModule, rank: int, scaling: float, entries: Mapping[str, TensorEntry], max_rank: int
) -> _Planned:
    if rank > max_rank:
        raise AdapterFormatError(f"{target.path} has rank {rank}; this server accepts ranks up to {max_rank}.")
    a = _tensor(entries, target, "lora_A", (rank, target.in_features))
    b = _tensor(entries, target, "lora_B", (target.out_features, rank))
    return _Planned(target, rank, scaling, a, b)


def _tensor(entries: Mapping[str, TensorEntry], target: TargetModule, part: str, shape: tuple[int, int]) -> TensorEntry:
    name = f"{PREFIX}{target.path}.{part}.weight"
    entry = entries.get(name)
    if entry is None:
        raise AdapterFormatError(
            f"{name} is missing, but the configuration's target_modules and layers need it; upload the whole adapter."
        )
    if 0 in entry.shape:
        raise AdapterFormatError(f"{name} has shape {list(entry.shape)}: a rank of 0 adapts nothing; train it again.")
    if entry.shape != shape:
        raise AdapterFormatError(
            f"{name} has shape {list(entry.shape)}, but this base and the configuration's rank need {list(shape)}."
        )
    return entry


def _module(planned: _Planned, arrays: Mapping[str, Array]) -> LoraModule:
    a, b, dtype = arrays[planned.a.name], arrays[planned.b.name], planned.a.dtype
    if dtype != planned.b.dtype or dtype == "F64":
        a, b, dtype = as_float32(a), as_float32(b), "F32"
    return LoraModule(planned.target.path, planned.rank, planned.scaling, a, b, _DTYPES[dtype])


def write_adapter(
    directory: Path, *, base_model: str, lora: LoraShape, modules: Mapping[str, tuple[Array, Array]]
) -> None:
    """Write an adapter that `PeftModel.from_pretrained` loads, complete or not at all.

    Args:
        directory: does not exist yet; its parent does.
        base_model: id of the base, for `base_model_name_or_path`.
        lora: rank, alpha, dropout, target modules, rsLoRA. A module of another rank gets an entry in `rank_pattern`.
        modules: by path (`model.layers.0.self_attn.q_proj`), A [rank, in] and B [out, rank], both float32, float16
            or (as uint16 bits) bfloat16. Every layer of the base must be there for each of `lora.target_modules`.

    Raises:
        ValueError: if shapes or names do not fit together.
        FileExistsError: if the directory exists; adapters are never replaced.
        StorageFullError: if the disk is full.
    """
    tensors: dict[str, Array] = {}
    rank_pattern: dict[str, int] = {}
    for path, (a, b) in modules.items():
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0 or a.dtype != b.dtype:
            raise ValueError(f"{path} has A {a.dtype} {a.shape} and B {b.dtype} {b.shape}, not [r, in] and [out, r].")
        if a.shape[0] != lora.rank:
            rank_pattern[path] = a.shape[0]
        tensors[f"{PREFIX}{path}.lora_A.weight"] = a
        tensors[f"{PREFIX}{path}.lora_B.weight"] = b
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in modules))
    target_modules = list(lora.target_modules) or names
    if set(names) != set(target_modules):
        raise ValueError(f"the modules are {sorted(names)}, but target_modules are {sorted(target_modules)}.")
    config = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "rank_pattern": rank_pattern,
        "target_modules": target_modules,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": lora.use_rslora,
    }
    with new_directory(directory) as temporary:
        (temporary / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_file(temporary / WEIGHTS_NAME, tensors)
