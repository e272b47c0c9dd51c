"""Adapters on disk: read with every check first, written so that `PeftModel.from_pretrained` loads them.

Free of torch. An adapter is a directory of `adapter_config.json` and `adapter_model.safetensors`; nothing else in it is
looked at, and nothing that the files refer to (a base path, code, a remote) is followed. What the two hold is the
business of the kinds (`tenora.adapters.kinds`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from tenora.adapters.arena_room import ArenaRoom
from tenora.adapters.atomic import new_directory
from tenora.adapters.digest import CONFIG_NAME, WEIGHTS_NAME, HashingBeside, content_hasher, damaged, digest_of
from tenora.adapters.head_files import HeadTensors, plan_heads, with_heads
from tenora.adapters.kinds.kind import Plan
from tenora.adapters.kinds.lora import LoraShape, lora_config, lora_tensors
from tenora.adapters.kinds.table import MAX_CONFIG_BYTES, parse_config, read_fields
from tenora.adapters.safetensors_file import (
    Array,
    TensorEntry,
    parse_header,
    read_array,
    read_arrays,
    read_header_text,
    read_metadata,
    require_below,
    write_file,
)
from tenora.adapters.table_rows import TableRows
from tenora.adapters.weights import AdapterSummary, AdapterWeights
from tenora.errors import AdapterFormatError

T = TypeVar("T")

_KEPT_LAYOUTS = 8  # of adapters that differ in ranks, modules or types


@dataclass(frozen=True, slots=True)
class _Layout:
    """A header that was checked: its tensors in the order of the file, and what they become."""

    entries: tuple[TensorEntry, ...]
    plan: Plan


class AdapterReader:
    """Reads adapters of one base. Safe to call from several threads.

    Checking a header of hundreds of tensors costs more than reading the weights, and the adapters that one program
    saves differ in nothing but their weights: what was found out about a header is kept for the next equal one.
    """

    def __init__(self, rows: TableRows, *, max_rank: int) -> None:
        """`rows` are those of the base that an adapter can fill, `max_rank` is the highest rank that is accepted."""
        self._rows = rows
        self._max_rank = max_rank
        self._layouts: OrderedDict[bytes, _Layout] = OrderedDict()
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
            layout = self._layout(config, header, file_size)
            if hashing is not None:
                hashing.update(len(header).to_bytes(8, "little") + header)
            found = read_arrays(file, layout.entries, None if hashing is None else hashing.update)
            arrays = dict(zip((entry.name for entry in layout.entries), found, strict=True))
        return layout.plan.weights(arrays)

    def _layout(self, config: bytes, header: bytes, file_size: int) -> _Layout:
        # SHA-256, because a tenant that could make two files collide could have one checked and another one served.
        key = hashlib.sha256(b"%d %d " % (len(config), file_size) + config + header).digest()
        layout = self._layouts.get(key)
        if layout is None:
            layout = _layout(config, header, file_size, self._rows, self._max_rank)
            self._layouts[key] = layout
            while len(self._layouts) > _KEPT_LAYOUTS:
                self._layouts.popitem(last=False)
        return layout


def read_adapter(directory: Path, rows: TableRows, *, max_rank: int) -> AdapterWeights:
    """Read and check an adapter.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors.
        rows: those of the base that an adapter can fill.
        max_rank: highest rank that is accepted.

    Raises:
        AdapterFormatError: if anything about it is not as it must be; the message names the tensor or field.
        FileNotFoundError: if the directory does not exist.
    """
    return AdapterReader(rows, max_rank=max_rank).read(directory)


def summarise(directory: Path, rows: TableRows, *, max_rank: int) -> AdapterSummary:
    """What the adapter of a directory is. No weight is read. Raises as `read_adapter`."""
    config = read_config(directory)
    with _open_weights(directory / WEIGHTS_NAME) as file:
        return _layout(config, *_header(config, file), rows, max_rank).plan.summary


def validate_files(
    config: bytes, weights: Path, rows: TableRows, *, max_rank: int, room: ArenaRoom | None = None
) -> AdapterSummary:
    """Check an upload exactly as `read_adapter` does, holding one tensor in memory at a time.

    Args:
        config: content of adapter_config.json.
        weights: the safetensors file, under any name.
        rows: those of the base that an adapter can fill.
        max_rank: highest rank that is accepted.
        room: where it is to be served.

    Raises:
        AdapterFormatError: as `read_adapter`, or it does not fit the room, or a weight is too large for its type.
    """
    with _open_weights(weights) as file:
        layout = _layout(config, *_header(config, file), rows, max_rank)
        summary = layout.plan.summary
        if room is not None:
            room.require(room.bytes_of(summary.parameters, bfloat16=summary.bfloat16))
        largest = math.inf if room is None else room.largest
        for entry in layout.entries:
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


def _layout(config: bytes, header: bytes, file_size: int, rows: TableRows, max_rank: int) -> _Layout:
    """Everything that can be checked without reading a weight."""
    parsed = parse_config(config)
    # Two or three tensors a module; with room for those of other formats, so that a name among them can tell which.
    entries = parse_header(header, file_size, max_tensors=4 * len(rows.modules))
    heads, others = plan_heads(read_fields(config), entries, read_metadata(header), rows.hidden)
    return _Layout(tuple(entries.values()), heads.beside(parsed.plan(others, rows, max_rank=max_rank)))


def write_adapter(
    directory: Path,
    *,
    base_model: str,
    lora: LoraShape,
    modules: Mapping[str, tuple[Array, Array]],
    heads: HeadTensors | None = None,
    scaling: float | None = None,
) -> None:
    """Write an adapter that `PeftModel.from_pretrained` loads, complete or not at all.

    Args:
        directory: does not exist yet; its parent does.
        base_model: id of the base, for `base_model_name_or_path`.
        lora: rank, alpha, dropout, target modules, rsLoRA. A module of another rank gets an entry in `rank_pattern`.
        modules: by path (`model.layers.0.self_attn.q_proj`), A [rank, in] and B [out, rank], both float32, float16
            or (as uint16 bits) bfloat16. Each of `lora.target_modules` must be there in every layer of the base, or in
            the same last layers.
        heads: of the adapter.
        scaling: of every module, whatever its rank; None: alpha over each one's rank, or the root of it.

    Raises:
        ValueError: if shapes or names do not fit together.
        FileExistsError: if the directory exists; adapters are never replaced.
        StorageFullError: if the disk is full.
    """
    write_files(directory, lora_config(base_model, lora, modules, scaling), lora_tensors(modules), heads=heads)


def write_files(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Array], *, heads: HeadTensors | None = None
) -> None:
    """Write the two files of an adapter, complete or not at all.

    Args:
        directory: does not exist yet; its parent does.
        config, tensors: what a kind made of an adapter (`tenora.adapters.kinds`).
        heads: of the adapter.

    Raises:
        ValueError: if the heads and their tensors do not fit together.
        FileExistsError: if the directory exists; adapters are never replaced.
        StorageFullError: if the disk is full.
    """
    config, tensors, metadata = with_heads(config, tensors, heads)
    with new_directory(directory) as temporary:
        (temporary / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_file(temporary / WEIGHTS_NAME, tensors, metadata)
