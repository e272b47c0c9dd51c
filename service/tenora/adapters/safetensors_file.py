"""A strict reader and a writer of safetensors files, for files that tenants send. Free of torch.

The format: 8 bytes, little endian, the length of the header; a JSON object from tensor names to dtype, shape and
`data_offsets`; then the bytes of the tensors, without gaps. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tenora.errors import AdapterFormatError

MAX_HEADER_BYTES = 8 * 2**20
MAX_NAME_LENGTH = 512
_MAX_DIMENSION = 2**40  # far above any real shape; keeps products of hostile numbers small
# numpy has no bfloat16: such tensors are their bits as uint16.
_ARRAY_TYPES: dict[str, type[np.generic]] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "F64": np.float64,
}
_FILE_TYPES = {np.dtype(array_type): name for name, array_type in _ARRAY_TYPES.items() if name != "F64"}
_CHUNK = 65536  # values that are looked at together, so that what is computed of them stays in the cache
_PIECE = 2**20  # bytes that are read at once
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        dtype: F32, F16, BF16 or F64.
        start: position of its first byte in the file.
        nbytes: its size.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header_text(file: BinaryIO) -> tuple[bytes, int]:
    """The header of an open file as it lies there, and the size of the file. Equal ones describe equal layouts.

    Raises:
        AdapterFormatError: if the file is a pickle, or the header is too large or does not fit it.
    """
    file_size = file.seek(0, 2)
    file.seek(0)
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(MAX_HEADER_BYTES, file_size - 8):
        if start.startswith(_PICKLE_STARTS):  # looked for here only: a header of 640 bytes starts like a pickle
            raise AdapterFormatError(
                "The weights are a pickle or zip archive, which is never opened; save them with "
                "safe_serialization=True."
            )
        raise AdapterFormatError(
            f"The weights are not a safetensors file: the header's length ({length} bytes) exceeds the file "
            f"({file_size} bytes) or the limit of {MAX_HEADER_BYTES} bytes. Upload it again."
        )
    return file.read(length), file_size


def parse_header(text: bytes, file_size: int, *, max_tensors: int) -> dict[str, TensorEntry]:
    """The tensors of a file by name, in the order of their bytes, from what `read_header_text` gave.

    Raises:
        AdapterFormatError: if the header is not JSON or not complete, if there are more than `max_tensors` tensors, if
            a dtype is not a float of 16 bits or more, or if the offsets leave gaps, overlap or do not end with the
            file.
    """
    header = parse_json_object(text, what="the safetensors header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterFormatError("__metadata__ of the safetensors header must map strings to strings.")
    if len(header) > max_tensors:
        raise AdapterFormatError(
            f"The file holds {len(header)} tensors, far more than this base has modules: it is made for another base."
        )
    end = 8 + len(text)
    found = [_entry(name, value, end) for name, value in header.items()]
    entries = sorted(found, key=lambda entry: (entry.start, entry.nbytes))  # an empty tensor comes before its neighbour
    for entry in entries:
        if entry.start != end:
            raise AdapterFormatError(f"{entry.name} overlaps another tensor or follows a gap; save the file again.")
        end += entry.nbytes
    if end != file_size:
        raise AdapterFormatError(
            f"The tensors end at byte {end}, the file at byte {file_size}: it is truncated or has trailing bytes. "
            "Upload it again."
        )
    return {entry.name: entry for entry in entries}


def _entry(name: str, value: Any, data_start: int) -> TensorEntry:
    if len(name) > MAX_NAME_LENGTH:
        raise AdapterFormatError(f"The safetensors header has a tensor name of {len(name)} characters.")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise AdapterFormatError(f"{name} must have a dtype, a shape and data_offsets in the safetensors header.")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ARRAY_TYPES:
        raise AdapterFormatError(f"{name} is of type {dtype!r}; use one of {', '.join(_ARRAY_TYPES)}.")
    if not _are_sizes(shape) or len(shape) > 8:
        raise AdapterFormatError(f"{name} has a shape that is not a list of sizes.")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise AdapterFormatError(f"{name} has data_offsets that are not two ascending positions.")
    nbytes = math.prod(shape) * np.dtype(_ARRAY_TYPES[dtype]).itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise AdapterFormatError(
            f"{name} has {offsets[1] - offsets[0]} bytes, but its shape {shape} in {dtype} needs {nbytes}."
        )
    return TensorEntry(name, dtype, tuple(shape), data_start + offsets[0], nbytes)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < _MAX_DIMENSION for size in value)


def read_array(file: BinaryIO, entry: TensorEntry) -> Array:
    """The values of one tensor; bfloat16 as its bits in uint16.

    Raises:
        AdapterFormatError: if a value is NaN or infinite, or the file ends early.
    """
    return read_arrays(file, [entry])[0]


def read_arrays(
    file: BinaryIO, entries: Sequence[TensorEntry], seen: Callable[[memoryview], None] | None = None
) -> list[Array]:
    """The values of tensors that lie back to back in the file, as views of one buffer: one check for all.

    Args:
        file: an open safetensors file.
        entries: in the order of their bytes, without gaps, as `parse_header` gives them.
        seen: gets the bytes, piece by piece as they are read; they stay as they are afterwards.

    Raises:
        AdapterFormatError: as `read_array`.
    """
    if not entries:
        return []
    first, last = entries[0].start, entries[-1].start + entries[-1].nbytes
    buffer: npt.NDArray[np.uint8] = np.empty(last - first, dtype=np.uint8)
    file.seek(first)
    got = 0
    for begin in range(0, buffer.size, _PIECE):
        piece = buffer.data[begin : begin + _PIECE]
        got += file.readinto(piece)  # type: ignore[attr-defined]  # of buffered files
        if seen is not None:
            seen(piece)
    arrays = [_view(buffer, entry, first) for entry in entries]
    for entry in entries:
        if entry.start + entry.nbytes > first + got:
            raise AdapterFormatError(f"{entry.name} is cut off; upload the file again.")
    if len({entry.dtype for entry in entries}) == 1 and all_finite(buffer.view(_ARRAY_TYPES[entries[0].dtype])):
        return arrays  # one look at all of it is five times as fast as one at each
    for entry, array in zip(entries, arrays, strict=True):
        if not all_finite(array):
            raise AdapterFormatError(
                f"{entry.name} holds NaN or infinite values; the training run diverged, train it again."
            )
    return arrays


def _view(buffer: Array, entry: TensorEntry, origin: int) -> Array:
    """One tensor of a buffer that starts at byte `origin` of the file."""
    count = math.prod(entry.shape)
    if count == 0:
        return np.empty(entry.shape, dtype=_ARRAY_TYPES[entry.dtype])
    flat: Array = np.frombuffer(buffer, dtype=_ARRAY_TYPES[entry.dtype], count=count, offset=entry.start - origin)
    return flat.reshape(entry.shape)


def as_float32(array: Array) -> Array:
    """The values in float32, to nearest; uint16 arrays are the bits of bfloat16."""
    if array.dtype == np.uint16:
        return np.left_shift(array, 16, dtype=np.uint32).view(np.float32)
    return array.astype(np.float32)


def require_below(largest: float, entry: TensorEntry, array: Array) -> None:
    """Raise AdapterFormatError if a value of the tensor has the magnitude `largest` or more."""
    if largest == math.inf or array.size == 0:
        return
    highest = float(np.abs(as_float32(array)).max())
    if highest >= largest:
        raise AdapterFormatError(
            f"{entry.name} holds {highest:g}, which the type that this server computes in cannot hold; train it again "
            "with a lower learning rate, or have the operator serve the base in a wider type."
        )


def all_finite(array: Array) -> bool:
    """Whether no value is NaN or infinite, in float32 for float64; uint16 arrays are the bits of bfloat16."""
    flat = array.reshape(-1)
    return all(_chunk_is_finite(flat[start : start + _CHUNK]) for start in range(0, flat.size, _CHUNK))


def _chunk_is_finite(values: Array) -> bool:
    if values.dtype == np.float64:
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
    if values.dtype != np.uint16:
        return bool(np.isfinite(values).all())
    # An exponent of ones is infinity or NaN: the bits without the sign are then the largest.
    return int((values & 0x7FFF).max()) < 0x7F80


def read_metadata(text: bytes) -> Mapping[str, str]:
    """What a header that `parse_header` has checked says beside its tensors."""
    if b"__metadata__" not in text:
        return {}
    found: dict[str, str] = parse_json_object(text, what="the safetensors header").get("__metadata__", {})
    return found


def write_file(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> None:
    """Write float32, float16 or (as uint16 bits) bfloat16 arrays. Not atomic: see `tenora.adapters.atomic`."""
    # Wider types first keeps every tensor aligned to its own size, as the format's own writer does.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in order:
        array = tensors[name]
        if array.dtype not in _FILE_TYPES:
            raise ValueError(f"{name} is {array.dtype}; write float32, float16 or bfloat16 bits as uint16.")
        header[name] = {
            "dtype": _FILE_TYPES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            file.write(np.ascontiguousarray(tensors[name]).data)


def parse_json_object(text: bytes, *, what: str) -> dict[str, Any]:
    """A JSON object without repeated names, NaN or infinity; AdapterFormatError that names `what` otherwise."""

    def refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a name occurs twice")
        return result

    def refuse_constant(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=refuse_repeats, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{what} is not valid JSON ({error}); save the adapter again.") from error
    if not isinstance(value, dict):
        raise AdapterFormatError(f"{what} must be a JSON object.")
    return value
