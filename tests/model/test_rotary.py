from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tenora.model.rotary import Rotary, rotate
from tenora.model.spec import ModelSpec
from tests.model.test_decoder import VARIANTS

ROPES = ("llama", "llama3_rope", "yarn_rope", "linear_rope", "dynamic_beyond_limit", "longrope_long", "longrope_short")


def pair(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[Rotary, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    rotary = Rotary(ModelSpec.from_directory(directory), dtype=dtype, device=torch.device("cpu"))
    return rotary, model.model.rotary_emb


@pytest.mark.parametrize("variant", ROPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_equal_transformers_to_the_bit(variant: str, dtype: torch.dtype, tiny: Callable[..., Path]) -> None:
    family, overrides = VARIANTS[variant]
    for length in (9, 16, 17, 200):
        rotary, theirs = pair(tiny(family, **overrides), dtype)
        positions = torch.arange(length)
        expected = theirs(torch.empty(0, dtype=dtype), positions[None])
        for lengths in (None, length, torch.full((length,), length)):
            for table, wanted in zip(rotary.table(positions, lengths), expected, strict=True):
                assert table.dtype == dtype
                assert torch.equal(table, wanted[0])


@pytest.mark.parametrize("variant", ["dynamic_beyond_limit", "longrope_long"])
def test_each_token_is_rotated_for_its_own_length(variant: str, tiny: Callable[..., Path]) -> None:
    family, overrides = VARIANTS[variant]
    rotary, _ = pair(tiny(family, **overrides))
    assert rotary.depends_on_length
    short, long = torch.arange(10), torch.arange(40)
    lengths = torch.cat([torch.full((10,), 10), torch.full((40,), 40)])
    cos, sin = rotary.table(torch.cat([short, long]), lengths)
    assert torch.equal(cos, torch.cat([rotary.table(short, 10)[0], rotary.table(long, 40)[0]]))
    assert torch.equal(sin, torch.cat([rotary.table(short, 10)[1], rotary.table(long, 40)[1]]))
    assert not torch.equal(rotary.table(short, 10)[0], rotary.table(short, 40)[0])
    assert rotary.length_class(10) == rotary.length_class(16) == 0 != rotary.length_class(40)


def test_length_class_is_zero_where_the_length_does_not_matter(tiny: Callable[..., Path]) -> None:
    rotary, _ = pair(tiny("yarn_rope"))
    assert not rotary.depends_on_length
    assert rotary.length_class(10_000) == 0


def test_rotation_keeps_norms_and_depends_on_distance_only(tiny: Callable[..., Path]) -> None:
    rotary, _ = pair(tiny())
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 16, generator=generator).expand(30, 1, 16) for _ in range(2))
    q_turned, k_turned = (rotate(x, *rotary.table(torch.arange(30), 30))[:, 0] for x in (q, k))
    torch.testing.assert_close(q_turned.norm(dim=1), q[:, 0].norm(dim=1))
    scores = q_turned @ k_turned.T
    torch.testing.assert_close(scores[5, 2], scores[25, 22], atol=1e-4, rtol=0)
    assert (scores[5, 2] - scores[5, 5]).abs() > 1e-2
