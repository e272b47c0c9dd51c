"""The longest sequence: derived from the model, and refused where more is asked for than can be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tenora.config import Settings
from tenora.engine.core import Engine
from tenora.errors import ConfigurationError
from tenora.model.loading import load_decoder
from tests.engine.driver import MakeDriver, greedy
from tests.engine.requests import sampling
from tests.support.tiny import build_tiny

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}


@pytest.fixture
def yarn_base(tmp_path: Path) -> Path:
    """As a model card has one add it: the length stays the one before the scaling."""
    return build_tiny(tmp_path / "yarn", "llama", max_position_embeddings=64, rope_parameters=YARN)


def test_a_yarn_base_serves_beyond_its_original_length(yarn_base: Path, driver: MakeDriver) -> None:
    tiny = driver(load_decoder(yarn_base))
    assert tiny.engine.ready.max_model_len == 256
    prompt = [3 + index % 90 for index in range(100)]
    model = transformers.AutoModelForCausalLM.from_pretrained(yarn_base, dtype=torch.float32)
    assert tiny.tokens(prompt, sampling(max_tokens=8)) == greedy(model, prompt, 8)[0]


def test_more_than_the_models_context_is_refused_before_anything_is_loaded(
    yarn_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr("tenora.engine.core.load_decoder", fail)
    with pytest.raises(
        ConfigurationError, match=r"is 257, but the model.s context is 256 tokens \(64 times the factor 4"
    ):
        Engine.load(Settings(max_model_len=257, device="cpu", dtype="float32"), yarn_base)


def test_more_than_the_kv_memory_holds_is_refused_with_what_is_needed(driver: MakeDriver) -> None:
    with pytest.raises(ConfigurationError, match=r"holds 64 tokens. Lower it, or raise TENORA_KV_CACHE_BYTES to \d+"):
        driver(kv_blocks=16, max_model_len=65)
    assert driver(kv_blocks=16, max_model_len=64).engine.max_model_len == 64
    assert driver(kv_blocks=16).engine.max_model_len == 64
