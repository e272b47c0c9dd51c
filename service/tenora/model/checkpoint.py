"""The safetensors files of a base model, mapped into memory, and whether they hold what they must."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tenora.errors import UnsupportedModelError
from tenora.model.spec import SUPPORTED, ModelSpec, read_json
from tenora.model.weights.base import Stored

__all__ = ["Checkpoint"]


class Checkpoint:
    """The tensors of a Hugging Face directory.

    Attributes:
        directory: where it lies.
        types: every tensor's type, as safetensors spells it.
    """

    def __init__(self, directory: Path, files: dict[str, Any]) -> None:
        """`files`: which open file each tensor is in."""
        self.directory = directory
        self._files = files
        self.types = {name: str(file.get_slice(name).get_dtype()) for name, file in files.items()}

    @classmethod
    @contextmanager
    def open(cls, directory: Path) -> Iterator[Checkpoint]:
        """Map its files, not reading them.

        Raises:
            UnsupportedModelError: a file is missing or not whole.
        """
        with ExitStack() as stack:
            opened = (stack.enter_context(_opened(path)) for path in _paths(directory))
            yield cls(directory, {name: file for file in opened for name in file.keys()})  # noqa: SIM118  # not a dict

    def tensor(self, name: str) -> Tensor:
        """A tensor, on the CPU."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def check(self, spec: ModelSpec, wanted: Iterable[Stored]) -> None:
        """Compare the checkpoint with what it must hold, all of it and nothing else.

        Raises:
            UnsupportedModelError: a tensor is missing, unexpected, of another shape or of another type; it is named.
        """
        unexpected = set(self.types)
        for name, shape, types in wanted:
            if name not in self.types:
                raise self._mismatch(f"the tensor {name} is missing")
            found = self._files[name].get_slice(name).get_shape()
            if tuple(found) != shape:
                raise self._mismatch(f"{name} has shape {found}, not {list(shape)}")
            if self.types[name] not in types:
                raise self._mismatch(f"{name} has type {self.types[name]}, so it is quantised")
            unexpected.discard(name)
        # Old checkpoints carry the RoPE buffers; they follow from the configuration.
        unexpected -= {name for name in unexpected if name.endswith("rotary_emb.inv_freq")}
        head, table = (f"{name}.weight" for name in (spec.layout.head, spec.layout.embedding))
        if spec.tie_word_embeddings and head in unexpected:
            # Some tied checkpoints repeat the embeddings; another matrix would contradict the configuration.
            if not _equal(self.tensor(head), self.tensor(table)):
                raise self._mismatch(f"{head} differs from the embeddings though tie_word_embeddings is true")
            unexpected.discard(head)
        if unexpected:
            raise self._mismatch(f"the tensor {min(unexpected)} is not part of a {spec.family} model")

    def _mismatch(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"The weights in {self.directory} do not fit its config.json: {reason}. {SUPPORTED}"
        )


def _paths(directory: Path) -> list[Path]:
    """Its safetensors files."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return [directory / "model.safetensors"]
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    if any(Path(name).name != name for name in names):
        raise UnsupportedModelError(f"{index} names files outside of its directory.")
    return [directory / name for name in names]


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise UnsupportedModelError(
            f"{path} is missing; a base model needs its weights as safetensors (model.safetensors or shards with "
            "model.safetensors.index.json)."
        )
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UnsupportedModelError(f"{path} is not a complete safetensors file ({error}); fetch it again.") from error


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and bool(torch.equal(first, second))
