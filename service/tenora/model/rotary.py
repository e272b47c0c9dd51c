"""Rotary position embedding (Su et al. 2021) with every scaling that transformers knows for these families.

Two scalings depend on how long the sequence is: `dynamic` (NTK) stretches its base once the sequence is longer than
`max_position_embeddings`, and `longrope` changes its factors beyond `original_max_position_embeddings`. transformers
takes the longest sequence of the batch at the moment of the call. Here every token carries the length that it is
rotated for, so that neither the rest of the batch nor the chunking of a prompt changes a result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenora.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class _RopeConfig:
    """The part of a transformers configuration that its RoPE initialisers read."""

    hidden_size: int
    num_attention_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_parameters: Mapping[str, Any]

    def standardize_rope_params(self) -> None:
        """Nothing to do: `ModelSpec` holds them in standard form already."""


class Rotary:
    """Turns positions into the cos and sin tables of a step.

    Attributes:
        depends_on_length: the scaling depends on the length of the sequence (`dynamic`, `longrope`).
    """

    def __init__(self, spec: ModelSpec, *, dtype: torch.dtype, device: torch.device) -> None:
        self.depends_on_length = spec.rope_type in {"dynamic", "longrope"}
        self._config = _RopeConfig(
            spec.hidden_size, spec.num_heads, spec.head_dim, spec.max_position_embeddings, spec.rope_parameters
        )
        self._type = spec.rope_type
        self._dtype = dtype
        self._device = device
        # Up to this length every sequence has the same frequencies.
        self._limit = spec.max_position_embeddings
        if self._type == "longrope":
            self._limit = int(spec.rope_parameters["original_max_position_embeddings"])
        self._short, self._scale = self._frequencies(None)

    def length_class(self, length: int) -> int:
        """Sequences whose prompts have equal classes may share cached keys; 0 where the length does not matter."""
        if not self.depends_on_length or length <= self._limit:
            return 0
        return 1 if self._type == "longrope" else length

    @torch.no_grad()
    def table(self, positions: Tensor, lengths: Tensor | int | None = None) -> tuple[Tensor, Tensor]:
        """Cos and sin for tokens at `positions`.

        Args:
            positions: int64 [T].
            lengths: the length that each token is rotated for: an int for all of them, or int64 [T]. The engine gives
                max(length of the prompt, position + 1): a prompt, in chunks or whole, then equals transformers' single
                forward pass, and generated tokens equal its cached generation. None takes the last position's, as
                transformers does. Ignored unless `depends_on_length`.

        Returns:
            Two tensors [T, head_dim] in the compute type.
        """
        angles = positions[:, None].float() * self._frequencies_of(positions, lengths)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self._scale).to(self._dtype), (angles.sin() * self._scale).to(self._dtype)

    def _frequencies_of(self, positions: Tensor, lengths: Tensor | int | None) -> Tensor:
        """Inverse frequencies, float32, [head_dim / 2] or, where tokens differ, [T, head_dim / 2]."""
        if not self.depends_on_length or positions.numel() == 0:
            return self._short
        if lengths is None:
            lengths = int(positions.max()) + 1
        if isinstance(lengths, int):
            return self._short if lengths <= self._limit else self._frequencies(lengths)[0]
        distinct, row_of_token = torch.unique(lengths.clamp(min=self._limit), return_inverse=True)
        rows = [self._short if n <= self._limit else self._frequencies(n)[0] for n in distinct.tolist()]
        return torch.stack(rows)[row_of_token.to(self._device)]

    def _frequencies(self, length: int | None) -> tuple[Tensor, float]:
        if self._type == "default":
            dim = self._config.head_dim
            exponents = torch.arange(0, dim, 2, dtype=torch.float, device=self._device) / dim
            return 1.0 / (self._config.rope_parameters["rope_theta"] ** exponents), 1.0
        # A second of every engine's start, which a base without scaling does not pay.
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: PLC0415

        # A tensor, as transformers passes it: the float32 power of `dynamic` then rounds alike, to the bit.
        seq_len = None if length is None else torch.tensor(length, device=self._device)
        frequencies, scale = ROPE_INIT_FUNCTIONS[self._type](self._config, self._device, seq_len=seq_len)
        return frequencies, float(scale)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads x [T, heads, head_dim] by the angles of their tokens (halves layout, as Hugging Face weights)."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos[:, None] + turned * sin[:, None]
