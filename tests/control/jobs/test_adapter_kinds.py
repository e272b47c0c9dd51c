"""What a job may ask of its adapter, of whatever type."""

from __future__ import annotations

from typing import Any

import pytest

from tenora.api.schemas.fine_tuning import JobCreateRequest
from tenora.control.jobs.requests import Asked, check_request
from tenora.control.jobs.shape import Limits, ParentShape, lora_spec
from tenora.errors import InvalidRequestError
from tenora.training.kinds.table import KINDS

BASE = "tiny"
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LIMITS = Limits(base_id=BASE, max_rank=64, max_model_len=512, target_modules=NAMES)
PARENT = ParentShape(rank=4, scaling=2.0, use_rslora=False, target_modules=frozenset(NAMES))


def asked(**body: Any) -> Asked:
    return check_request(JobCreateRequest(model=BASE, training_file="file", **body).to_request(), LIMITS)


def refused(**body: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        asked(**body)
    return caught.value


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_has_a_shape_of_its_own_settings(kind: str) -> None:
    shape = lora_spec(asked(adapter={"type": kind}).lora, LIMITS)
    assert shape.type == kind
    assert shape.own == {setting.name: setting.default for setting in KINDS[kind].settings}


def test_lora_and_an_adapter_of_that_type_are_the_same() -> None:
    settings = {"rank": 5, "alpha": 3.0, "dropout": 0.1, "target_modules": ["q_proj"], "use_rslora": True}
    assert asked(lora=settings).lora == asked(adapter={"type": "lora", **settings}).lora


def test_what_is_asked_stands_in_the_shape() -> None:
    dora = lora_spec(asked(adapter={"type": "dora", "rank": 5, "target_modules": ["q_proj"]}).lora, LIMITS)
    assert (dora.rank, dora.alpha, dora.target_modules) == (5, 10.0, ("q_proj",))
    bottleneck = lora_spec(asked(adapter={"type": "bottleneck", "reduction_factor": 4}).lora, LIMITS)
    assert bottleneck.own["reduction_factor"] == 4


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"adapter": {"type": "lora", "rank": 8}, "lora": {"rank": 8}}, "adapter"),
        ({"adapter": {"type": "ia3", "rank": 8}}, "adapter.rank"),
        ({"adapter": {"type": "lora", "reduction_factor": 2}}, "adapter.reduction_factor"),
        ({"adapter": {"type": "dora", "target_modules": ["nothing"]}}, "adapter.target_modules"),
        ({"adapter": {"type": "dora", "init_from": "mine"}}, "adapter.init_from"),
        ({"adapter": {"type": "prefix", "num_virtual_tokens": 510}}, "adapter.num_virtual_tokens"),
        ({"adapter": {"type": "ia3"}, "sweep": {"rank": [2, 4]}}, "sweep.rank"),
    ],
)
def test_what_a_type_does_not_have_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    error = refused(**body)
    assert error.param == param
    assert error.message


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lora"])
def test_only_lora_goes_on_from_another_adapter(kind: str) -> None:
    with pytest.raises(InvalidRequestError, match="begins as the base"):
        lora_spec({"type": kind}, LIMITS, PARENT)


def test_an_adapter_to_start_from_may_stand_in_either_place() -> None:
    assert asked(adapter={"type": "lora", "init_from": "mine"}).lora == {"init_from": "mine"}
