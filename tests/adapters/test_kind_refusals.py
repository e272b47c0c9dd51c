"""Configurations and tensors of (IA)³ and VeRA that cannot be served are refused with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tenora.adapters.kinds.ia3 import ia3_files
from tenora.adapters.kinds.vera import drawn, vera_files
from tenora.adapters.peft_format import read_adapter
from tenora.errors import AdapterFormatError
from tests.adapters.files import ROWS, save

IA3: dict[str, tuple[dict[str, Any], str]] = {
    "an input that is no product": (
        {"feedforward_modules": ["k_proj", "down_proj"]},
        "names model.layers.0.self_attn.k_proj, whose input cannot be scaled here: only that of down_proj is a product",
    ),
    "inputs unsaid": ({"feedforward_modules": None}, "feedforward_modules is None: which vectors scale an input"),
    "an output read as an input": (
        {"feedforward_modules": []},
        "mlp.down_proj.ia3_l has shape [1, 112], but this base and the configuration's target_modules need [48, 1]",
    ),
    "a module without a vector": ({"target_modules": ["k_proj", "down_proj", "q_proj"]}, "q_proj.ia3_l is missing"),
    "a vector without a module": ({"target_modules": ["down_proj"]}, "k_proj.ia3_l is in the file, but target_modules"),
    "a module that the base lacks": ({"target_modules": ["c_attn"]}, "target_modules names 'c_attn', which this base"),
    "modules in full": ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
    "a classifier of tokens": ({"task_type": "TOKEN_CLS"}, "task_type is 'TOKEN_CLS'"),
    "a field of the future": ({"use_teleport": 7}, "use_teleport is 7, a field that this version does not know"),
}
VERA: dict[str, tuple[dict[str, Any], str]] = {
    "a rank beyond the server's": ({"r": 256}, "r is 256; this server accepts ranks up to 64"),
    "another rank": ({"r": 9}, "base_model.vera_A has shape [8, 112], but this base and save_projection need [9, 112]"),
    "projections to be drawn that are there": ({"save_projection": False}, "vera_A is in the file"),
    "a wider module": ({"target_modules": ["q_proj", "up_proj"]}, "base_model.vera_A has shape [8, 112]"),
    "biases": ({"bias": "all"}, "bias is 'all': trained biases"),
    "no seed": ({"projection_prng_key": "x"}, "projection_prng_key is 'x'"),
    "a field of the future": ({"use_teleport": 7}, "use_teleport is 7, a field that this version does not know"),
}


def refusal(directory: Path) -> str:
    with pytest.raises(AdapterFormatError) as raised:
        read_adapter(directory, ROWS, max_rank=64)
    assert raised.value.message.endswith(".")
    return raised.value.message


@pytest.mark.parametrize("case", IA3)
def test_ia3(case: str, tmp_path: Path) -> None:
    change, reason = IA3[case]
    scales = {
        module.path: np.ones(module.out_features, np.float32)
        for module in ROWS.modules
        if module.name in ("k_proj", "up_proj")
    }
    config, tensors = ia3_files("some/base", scales, ROWS)
    assert read_adapter(save(tmp_path, config, tensors), ROWS, max_rank=64).target_modules == ("k_proj", "down_proj")
    assert reason in refusal(save(tmp_path, config | change, tensors))


@pytest.mark.parametrize("case", VERA)
def test_vera(case: str, tmp_path: Path) -> None:
    change, reason = VERA[case]
    vectors = {
        module.path: (np.ones(8, np.float32), np.ones(module.out_features, np.float32))
        for module in ROWS.modules
        if module.name in ("q_proj", "down_proj")
    }
    config, tensors = vera_files("some/base", drawn(0, 8, 112, 48), vectors)
    assert read_adapter(save(tmp_path, config, tensors), ROWS, max_rank=64).rank == 8
    assert reason in refusal(save(tmp_path, config | change, tensors))
