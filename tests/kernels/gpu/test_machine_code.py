"""What the compiler made of the order and the products that the kernels ask for: machine code of sm_90, no GPU."""

from __future__ import annotations

import re

import pytest
import torch

from tests.kernels.gpu.aot import machine_code
from tests.kernels.gpu.launches import LLAMA_8B, TRAINED, Launch, Product, recording

WAIT, LAUNCH = "ACQBULK", "PREEXIT"  # griddepcontrol.wait and .launch_dependents
SUM = "LDG.E.STRONG.GPU"  # a load past the first-level cache: only the planes are read so


def launches(product: Product) -> dict[str, Launch]:
    with recording(product.label, "sm90") as log:
        product.launch()
    return {launch.name: launch for launch in log}


def where(code: list[str], what: str) -> list[int]:
    return [index for index, line in enumerate(code) if re.search(rf"(^|\s){re.escape(what)}\b", line)]


def tensor_core(code: list[str]) -> list[str]:
    """Products of matrices; `HFMA2.MMA` is none."""
    return [line for line in code if re.search(r"(^|\s)H(G)?MMA\.", line)]


@pytest.mark.parametrize("rows", [32, 2048], ids=["decode", "prefill"])
def test_expand_reads_no_sum_before_the_launch_that_writes_it_has_ended(rows: int) -> None:
    """Programmatic dependent launch: up to the wait, `shrink` may still be writing the planes."""
    code = machine_code(launches(Product(LLAMA_8B, "qkv", 16, rows))["expand"], "sm90")
    waits, sums = where(code, WAIT), where(code, SUM)
    assert waits
    assert sums
    assert min(sums) > min(waits)
    stores = where(code, "STG.E.128") + where(code, "STG.E")
    assert min(stores) > min(waits), "nor is anything written that another launch may still read"


def test_the_weights_of_a_lone_row_are_under_way_when_expand_begins_to_wait() -> None:
    """32 KiB of weights, 16 bytes a thread and load; beside them only what says where they lie."""
    code = machine_code(launches(Product(LLAMA_8B, "qkv", 16, 32))["expand"], "sm90")
    wait = min(where(code, WAIT))
    early = [index for index in where(code, "LDG.E.128") if index < wait]
    threads = 128
    assert len(early) * threads * 16 >= 32 << 10
    assert not [index for index in where(code, SUM) if index < wait]


@pytest.mark.parametrize("rows", [32, 2048], ids=["decode", "prefill"])
def test_shrink_waits_before_it_reads_anything_and_then_lets_expand_begin(rows: int) -> None:
    """It reads x and the step's metadata, which the launches before it write."""
    code = machine_code(launches(Product(LLAMA_8B, "qkv", 16, rows))["shrink"], "sm90")
    (wait,), (begin,) = where(code, WAIT), where(code, LAUNCH)
    loads = [index for index, line in enumerate(code) if re.search(r"\bLDG", line)]
    assert wait < begin < min(loads)


@pytest.mark.parametrize("rows", [32, 2048], ids=["few rows", "many rows"])
def test_training_runs_on_the_tensor_cores_with_the_types_that_it_has(rows: int) -> None:
    """A float32 arena beside bfloat16 rows gave shrink none, and 256 multiplications of single numbers."""
    assert TRAINED.x == TRAINED.weights == torch.bfloat16
    found = launches(Product(LLAMA_8B, "qkv", 16, rows, backward=True))
    assert set(found) >= {"shrink", "expand_joint", "lora_wgrad"}
    for name in ("shrink", "expand_joint", "lora_wgrad"):
        code = machine_code(found[name], "sm90")
        assert tensor_core(code), name
    mixed = launches(Product(LLAMA_8B, "qkv", 16, 2048, weights=torch.float32))["shrink"]
    assert not tensor_core(machine_code(mixed, "sm90")), "the test could not tell the two apart"
