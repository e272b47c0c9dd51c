"""The tensors of a file as a kind asks for them: by name and shape first, then as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tenora.adapters.safetensors_file import Array, TensorEntry, as_float32
from tenora.errors import AdapterFormatError

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Expected:
    """Takes the tensors that a configuration needs out of a file, and refuses what is left."""

    def __init__(self, entries: Mapping[str, TensorEntry]) -> None:
        """`entries`: every tensor of the file by name."""
        self._entries = entries
        self._taken: set[str] = set()

    def take(self, name: str, shape: tuple[int, ...], needed_by: str) -> TensorEntry:
        """A tensor of this shape. Raises AdapterFormatError if it is not there; `needed_by` says what needs it."""
        entry = self._entries.get(name)
        if entry is None:
            raise AdapterFormatError(f"{name} is missing, but {needed_by} needs it; upload the whole adapter.")
        if entry.shape != shape:
            raise AdapterFormatError(
                f"{name} has shape {list(entry.shape)}, but this base and {needed_by} need {list(shape)}."
            )
        self._taken.add(name)
        return entry

    def has(self, name: str) -> bool:
        """Whether the file has a tensor of this name."""
        return name in self._entries

    def refuse_others(self, named_by: str) -> None:
        """Raise AdapterFormatError for the first tensor that was not taken; `named_by` is what should name it."""
        for name in self._entries:
            if name not in self._taken:
                raise AdapterFormatError(f"{name} is in the file, but {named_by} does not name it; they must agree.")


def alike(arrays: Mapping[str, Array], entries: Sequence[TensorEntry]) -> tuple[str, list[Array]]:
    """Tensors in one type, and its name: as they are if they share one that adapters are kept in, else float32."""
    types = {entry.dtype for entry in entries}
    found = [arrays[entry.name] for entry in entries]
    if len(types) == 1 and (kept := _DTYPES.get(types.pop())) is not None:
        return kept, found
    return "float32", [as_float32(array) for array in found]


def wide(arrays: Mapping[str, Array], entries: Sequence[TensorEntry]) -> list[Array]:
    """Tensors in float32."""
    return [as_float32(arrays[entry.name]) for entry in entries]


def all_bfloat16(entries: Sequence[TensorEntry]) -> bool:
    """Whether all of them are bfloat16."""
    return all(entry.dtype == "BF16" for entry in entries)
