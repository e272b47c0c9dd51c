"""A weight format is a file and an entry in `KINDS`: here int8 with a scale per row, beside dense embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tenora.errors import UnsupportedModelError
from tenora.model.layout import Matrix
from tenora.model.loading import load_decoder
from tenora.model.weights import kinds
from tenora.model.weights.base import Place, Stored, derived_product


@dataclass(frozen=True)
class Int8:
    """W = scale · values."""

    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return derived_product(x, self, bias)

    def rows(self, index: Tensor) -> Tensor:
        return self.values[index] * self.scale[index, None]

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.values * self.scale[:, None]).t()

    def backward(self, dy: Tensor) -> Tensor:
        return dy @ (self.values * self.scale[:, None])

    @classmethod
    def supports(cls, matrix: Matrix, types: Mapping[str, str], place: Place) -> bool:
        return all(types.get(f"{path}.weight") == "I8" for path, _ in matrix.parts)

    @classmethod
    def tensors(cls, matrix: Matrix) -> list[Stored]:
        values = [Stored(f"{path}.weight", (n, matrix.input), frozenset({"I8"})) for path, n in matrix.parts]
        return values + [Stored(f"{path}.weight_scale", (n,)) for path, n in matrix.parts]

    @classmethod
    def read(cls, matrix: Matrix, tensor: Callable[[str], Tensor], place: Place) -> Int8:
        names = [stored.name for stored in cls.tensors(matrix)]
        parts = [tensor(name) for name in names]
        half = len(matrix.parts)
        return cls(torch.cat(parts[:half]), torch.cat(parts[half:]))


def test_a_new_kind_is_read_multiplied_and_differentiated(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny("smollm2")
    tensors = load_file(base / "model.safetensors")
    quantised, plain = dict(tensors), dict(tensors)
    for name, value in tensors.items():
        if name.startswith("model.layers.") and value.dim() == 2:
            scale = value.abs().amax(1) / 127
            quantised[name] = (value / scale[:, None]).round().to(torch.int8)
            quantised[f"{name}_scale"] = scale
            plain[name] = quantised[name] * scale[:, None]
    for directory, content in ((tmp_path / "int8", quantised), (tmp_path / "plain", plain)):
        directory.mkdir()
        (directory / "config.json").write_bytes((base / "config.json").read_bytes())
        save_file(content, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="has type I8"):
        load_decoder(tmp_path / "int8")

    monkeypatch.setattr(kinds, "KINDS", (Int8, *kinds.KINDS))
    ours, theirs = load_decoder(tmp_path / "int8"), load_decoder(tmp_path / "plain")
    assert ours.nbytes < theirs.nbytes
    for one, other in zip(ours.weights(), theirs.weights(), strict=True):
        assert one.shape == other.shape
        x = torch.randn(5, one.shape[1], generator=torch.Generator().manual_seed(0), requires_grad=True)
        index = torch.tensor([0, 2])
        torch.testing.assert_close(one.multiply(x), other.multiply(x))
        torch.testing.assert_close(one.rows(index), other.rows(index))
        slopes = [torch.autograd.grad(weight.multiply(x).square().sum(), x)[0] for weight in (one, other)]
        torch.testing.assert_close(*slopes)
