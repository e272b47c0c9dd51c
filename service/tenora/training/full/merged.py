"""The result of a full fine-tuning: a Hugging Face directory that `from_pretrained` and `tenora serve` load."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tenora.adapters.atomic import new_directory
from tenora.adapters.safetensors_file import write_file
from tenora.model.checkpoint import Checkpoint
from tenora.model.spec import read_json

MAX_SHARD_BYTES = 5 * 10**9
"""Of a file of weights; what transformers writes by default, too."""
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_COPIED = frozenset({".json", ".jinja", ".model", ".txt"})
_CHUNK = 2**20

Float32Array = npt.NDArray[np.float32]


def write_merged(
    directory: Path, base: Path, trained: Mapping[str, Tensor], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> str:
    """Write a base with other tensors in the place of some of its own, complete or not at all.

    Everything is float32, as it was trained: what the tensors have moved by is often less than half of the last digit
    of a two-byte type, which would forget it. Configuration, tokenizer and generation settings are the base's.

    Args:
        directory: does not exist yet; its parent does.
        base: the directory of the base.
        trained: by their names in the base's checkpoint.

    Returns:
        The digest of what was written; see `digest_of`.

    Raises:
        StorageFullError: the disk is full.
        FileExistsError: the directory exists.
    """
    with new_directory(directory) as temporary:
        for path in sorted(base.iterdir()):
            if path.is_file() and path.suffix in _COPIED and path.name not in {"config.json", _INDEX}:
                shutil.copyfile(path, temporary / path.name)
        config = json.dumps(_config(base), indent=2) + "\n"
        (temporary / "config.json").write_text(config, encoding="utf-8")
        with Checkpoint.open(base) as checkpoint:
            shards = list(_shards(checkpoint, max_shard_bytes))
            for number, names in enumerate(shards, start=1):
                file = _SINGLE if len(shards) == 1 else _shard_name(number, len(shards))
                write_file(temporary / file, {name: _array(checkpoint, trained, name) for name in names})
        if len(shards) > 1:
            (temporary / _INDEX).write_text(json.dumps(_index(shards, temporary), indent=2) + "\n", encoding="utf-8")
        return digest_of(temporary)


def digest_of(directory: Path) -> str:
    """SHA-256 in hex digits over the files of a directory: of each, by name, its name, its size and its bytes."""
    hasher = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        hasher.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                hasher.update(chunk)
    return hasher.hexdigest()


def _config(base: Path) -> dict[str, Any]:
    config = read_json(base / "config.json", required=True)
    config.pop("torch_dtype", None)
    return config | {"dtype": "float32"}


def _shards(checkpoint: Checkpoint, most: int) -> Iterator[list[str]]:
    """The names of each file's tensors; a tensor is in one file."""
    names: list[str] = []
    size = 0
    for name in sorted(checkpoint.types):
        own = checkpoint.tensor(name).numel() * 4
        if names and size + own > most:
            yield names
            names, size = [], 0
        names.append(name)
        size += own
    yield names


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _index(shards: list[list[str]], directory: Path) -> dict[str, Any]:
    files = {name: _shard_name(number, len(shards)) for number, names in enumerate(shards, start=1) for name in names}
    size = sum((directory / file).stat().st_size for file in set(files.values()))
    return {"metadata": {"total_size": size}, "weight_map": files}


def _array(checkpoint: Checkpoint, trained: Mapping[str, Tensor], name: str) -> Float32Array:
    tensor = trained[name] if name in trained else checkpoint.tensor(name)
    array: Float32Array = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return array
