"""What a full fine-tuning may ask for, and what it is told that can never be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tenora.control.jobs.apart import served_rank
from tenora.control.jobs.records import JobRequest
from tenora.control.jobs.requests import check_request
from tenora.control.jobs.shape import Limits
from tenora.errors import AdapterFormatError, InvalidRequestError
from tenora.model.tokenizer import Tokenizer
from tenora.training.full import memory
from tenora.training.full.memory import require_memory
from tenora.training.methods.full import METHOD
from tenora.training.spec import LoraSpec
from tests.control.conftest import BASE
from tests.control.jobs.test_job_fields import ALL_LINEAR, LIMITS, Prepared

JOB: dict[str, Any] = {"training_file": "few", "method": {"type": "full"}}


@pytest.fixture
def prepared(tmp_path: Path, tokenizer: Tokenizer) -> Prepared:
    return Prepared(tmp_path, tokenizer)


def full(**values: Any) -> dict[str, Any]:
    return {"type": "full", "full": METHOD.placed(values)}


@pytest.mark.parametrize(
    "own",
    [
        {"layers": "last 1"},
        {"embeddings": True},
        {"norms": True},
        {"serve_as": "none"},
        {"n_epochs": 7},
        {"batch_size": 3},
        {"learning_rate_multiplier": 0.5},
    ],
    ids=lambda own: next(iter(own)),
)
def test_each_of_its_settings_changes_the_run(prepared: Prepared, own: dict[str, Any]) -> None:
    assert prepared.run({**JOB, "method": full(**own)}) != prepared.run(JOB)


def test_few_rows_are_held_out_not_divided_into_folds_and_the_rate_is_a_tenth(prepared: Prepared) -> None:
    plan, _ = msgspec.json.decode(prepared.run(JOB))
    assert (plan["folds"], plan["learning_rate"]) == (0, 5e-5)
    assert plan["tasks"][0]["valid_path"]
    assert plan["method_settings"] == {"layers": "all", "embeddings": False, "norms": False, "serve_as": "adapter"}


def test_the_rank_of_what_is_served_is_the_highest_that_fits() -> None:
    def fits(lora: LoraSpec) -> None:
        if lora.rank > 100:
            raise AdapterFormatError("too large")

    limits = Limits(BASE, 256, 256, ALL_LINEAR, fits)
    assert served_rank(limits) == 64
    assert served_rank(Limits(BASE, 16, 256, ALL_LINEAR)) == 16
    assert served_rank(Limits(BASE, 2, 256, ALL_LINEAR)) == 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "my-adapter"}, "model"),
        ({"lora": {"init_from": "my-adapter"}}, "lora.init_from"),
        ({"lora": {"alpha": 3.0}}, "lora.alpha"),
        ({"lora": {"target_modules": ["q_proj"]}}, "lora.target_modules"),
        ({"sweep": {"learning_rate": [1e-5, 1e-4]}}, "sweep"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_belongs_to_an_adapter_is_refused(fields: dict[str, Any], param: str) -> None:
    request = JobRequest(**{"model": BASE, "training_file": "few", "method": {"type": "full"}, **fields})
    with pytest.raises(InvalidRequestError) as refused:
        check_request(request, LIMITS)
    assert refused.value.param == param


@pytest.mark.parametrize("layers", ["last 0", "last 4", "3", "2-1", "first 2", "0;1", ","])
def test_layers_that_the_base_lacks_are_refused(tiny_base: Path, layers: str) -> None:
    with pytest.raises(InvalidRequestError, match=r'write "all", "last 4", or numbers from 0 to 2') as refused:
        require_memory(tiny_base, {"layers": layers, "embeddings": False, "norms": False})
    assert refused.value.param == "layers"


def test_a_base_that_this_machine_can_never_hold_is_refused_with_the_bytes(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"layers": "all", "embeddings": False, "norms": False}
    require_memory(tiny_base, settings)
    monkeypatch.setattr(memory, "total_bytes", lambda: 300 * 2**20)
    with pytest.raises(InvalidRequestError, match=r"needs [\d,]+ bytes of memory .* and 314,572,800 are available"):
        require_memory(tiny_base, settings)
