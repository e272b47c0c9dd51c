"""Bottleneck adapters of AdapterHub's library are served as it computes them; `adapterhub/record.py` recorded that."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tenora.adapters.kinds.bottleneck import Bottleneck, bottleneck_files
from tenora.adapters.kinds.table import parse_config
from tenora.adapters.peft_format import CONFIG_NAME, WEIGHTS_NAME, summarise, write_files
from tenora.adapters.table_rows import RowKind
from tenora.adapters.weights import AdapterWeights
from tenora.errors import AdapterFormatError
from tenora.model.decoder import Decoder
from tenora.model.loading import load_decoder
from tenora.model.spec import table_rows
from tests.model.adapterhub.record import CASES, HERE, IDS, write_base
from tests.model.served import our_logits, read


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return load_decoder(write_base(tmp_path_factory.mktemp("base")))


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[[str], Path]:
    """The directory of a recorded adapter, its weights under the name that they have in the store."""

    def lay(case: str) -> Path:
        shutil.copy(HERE / case / CONFIG_NAME, tmp_path / CONFIG_NAME)
        shutil.copy(HERE / case / "adapter.safetensors", tmp_path / WEIGHTS_NAME)
        return tmp_path

    return lay


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_adapterhubs_library(case: str, base: Decoder, adapter: Callable[[str], Path]) -> None:
    """float32; the largest difference is at most 1e-5 of the largest logit."""
    with np.load(HERE / "logits.npz") as recorded:
        wanted = torch.from_numpy(recorded[case])
    found = our_logits(base, adapter(case), torch.from_numpy(IDS))
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert float((found - our_logits(base, None, torch.from_numpy(IDS))).abs().max()) > 0.1


@pytest.mark.parametrize("case", ["pfeiffer", "parallel", "pfeiffer-elsewhere"])
def test_what_is_written_reads_back(case: str, base: Decoder, adapter: Callable[[str], Path], tmp_path: Path) -> None:
    weights = read(base, adapter(case))
    write_files(tmp_path / "ours", *rewritten(weights))
    ours = read(base, tmp_path / "ours")
    assert (ours.flags, ours.rank, len(ours.parts)) == (weights.flags, weights.rank, len(weights.parts))
    for one, other in zip(ours.parts, weights.parts, strict=True):
        assert (one.kind, one.path, one.scaling) == (other.kind, other.path, other.scaling)
        assert np.array_equal(one.a, other.a)
        assert np.array_equal(one.bt, other.bt)


def rewritten(weights: AdapterWeights) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the writer makes of an adapter as it was read."""
    of = {(part.kind, part.path): part for part in weights.parts}
    bottlenecks = {
        path: Bottleneck(
            part.a, of[RowKind.INNER_BIAS, path].a[:, 0], part.bt.T, of[RowKind.OUTER_BIAS, path].a.reshape(-1)
        )
        for (kind, path), part in of.items()
        if kind == RowKind.BOTTLENECK
    }
    scaling = next(part.scaling for part in weights.parts if part.kind == RowKind.BOTTLENECK)
    return bottleneck_files("some/base", bottlenecks, flags=weights.flags, scaling=scaling, layers=3, family="llama")


def test_a_summary_counts_all_rows(base: Decoder, adapter: Callable[[str], Path]) -> None:
    directory = adapter("houlsby")
    summary, weights = summarise(directory, table_rows(base.spec), max_rank=64), read(base, directory)
    assert (summary.kind, summary.rank, summary.target_modules) == ("bottleneck", 16, ("self_attn", "mlp"))
    assert summary.parameters == sum(part.a.size + part.bt.size for part in weights.parts)
    assert summary.nbytes == 4 * summary.parameters


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a norm of its own": ({"ln_after": True}, "ln_after is True: a norm of the adapter's own is not served"),
    "gates": ({"use_gating": True}, "use_gating is True"),
    "Compacter": ({"phm_layer": True}, "phm_layer is True: Compacter"),
    "invertible adapters": ({"inv_adapter": "nice"}, "inv_adapter is 'nice'"),
    "learned scaling": ({"scaling": "learned"}, "scaling is 'learned': learned scalings are not served"),
    "another architecture": ({"architecture": "lora"}, "architecture is 'lora': of AdapterHub's adapters bottlenecks"),
    "an activation": ({"non_linearity": "leakyrelu"}, "non_linearity is 'leakyrelu'; bottlenecks are served with gelu"),
    "the residual stream twice": ({"residual_before_ln": False}, "leave the residual stream out or add it twice"),
    "the residual stream never": ({"original_ln_after": False}, "leave the residual stream out or add it twice"),
    "a norm behind the block": ({"residual_before_ln": "post_add"}, "residual_before_ln is 'post_add'"),
    "no place": ({"output_adapter": False}, "mh_adapter and output_adapter are both false"),
    "no layer": ({"leave_out": [0, 1, 2]}, "leave_out leaves no layer"),
    "no default": ({"reduction_factor": {"0": 8}}, "reduction_factor says nothing of layer 1"),
    "a factor of nothing": ({"reduction_factor": 0}, "reduction_factor is 0"),
    "another width": ({"reduction_factor": 4}, "has shape [4, 32], but this base and the configuration need [8, 32]"),
    "too wide": ({"reduction_factor": 0.25}, "makes bottlenecks of 128; this server accepts"),
    "a place without tensors": ({"mh_adapter": True}, "attention_adapters.adapters.pfeiffer.adapter_down.0.weight is"),
    "tensors without a place": ({"leave_out": [1]}, "is in the file, but the configuration does not name it"),
    "a field of the future": ({"use_teleport": 7}, "use_teleport is 7, a field that this version does not know"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_with_the_reason(
    case: str, base: Decoder, adapter: Callable[[str], Path]
) -> None:
    change, reason = REFUSED[case]
    directory = adapter("pfeiffer")
    fields = json.loads((directory / CONFIG_NAME).read_text())
    fields["config"] |= change
    (directory / CONFIG_NAME).write_text(json.dumps(fields))
    with pytest.raises(AdapterFormatError) as raised:
        read(base, directory)
    assert reason in raised.value.message
    assert raised.value.message.endswith(".")


def test_an_adapter_of_another_base_is_refused(base: Decoder, adapter: Callable[[str], Path]) -> None:
    directory = adapter("pfeiffer")
    text = (directory / CONFIG_NAME).read_bytes().replace(b'"hidden_size": 32', b'"hidden_size": 48')
    (directory / CONFIG_NAME).write_bytes(text)
    assert parse_config(text).raw["hidden_size"] == 48
    with pytest.raises(AdapterFormatError, match="hidden_size is 48, and this base has 32"):
        read(base, directory)
