"""Python and the compiled kernels find the arguments of a call by name, wherever they lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tenora_kernels.cpu.attention import paged, sequences
from tenora_kernels.cpu.decoder import layer_arguments, loss, step
from tenora_kernels.cpu.lowrank import factors, lowrank
from tenora_kernels.cpu.runtime.arguments import arguments, assign, declare
from tenora_kernels.cpu.runtime.compiled import job

DECLARATIONS = (
    step.STEP, step.LAYER, paged.CALL, sequences.ATTENTION, sequences.SEQUENCE, layer_arguments.FORWARD,
    layer_arguments.BACKWARD, loss.LOSS, lowrank.LORA, factors.FACTORS,
)  # fmt: skip


def reading() -> Any:
    """A kernel that reads two arguments by name."""

    @job()
    def read(calls, out):  # type: ignore[no-untyped-def]  # compiled
        out[0], out[1] = calls[0].first, calls[0].second

    return read


@pytest.mark.parametrize("names", [("first", "second", "third"), ("third", "second", "first")])
def test_a_kernel_reads_what_python_wrote_whatever_the_order_of_the_declaration(names: tuple[str, ...]) -> None:
    call, out = arguments(declare(*names), third=3, first=1, second=2), np.zeros(2, np.int64)
    reading()(call, out)
    assert out.tolist() == [1, 2]


def test_a_name_that_only_the_kernel_knows_does_not_compile() -> None:
    with pytest.raises(KeyError, match="second"):
        reading()(arguments(declare("first"), first=1), np.zeros(2, np.int64))


def test_a_name_that_is_missing_or_that_nobody_reads_is_an_error() -> None:
    call = declare("first", "second")
    with pytest.raises(TypeError, match=r"lack \['second'\]"):
        arguments(call, first=1)
    with pytest.raises(TypeError, match=r"have \['third'\]"):
        arguments(call, first=1, second=2, third=3)
    with pytest.raises(ValueError, match="third"):
        assign(arguments(call, first=1, second=2), third=3)


def test_what_is_given_by_name_comes_before_what_is_known() -> None:
    (call,) = arguments(declare("first", "second"), {"second": 2, "unused": 9}, {"first": 5, "second": 7}, first=1)
    assert (call["first"], call["second"]) == (1, 2)


@pytest.mark.parametrize("declaration", DECLARATIONS)
def test_arguments_are_whole_numbers_side_by_side(declaration: np.dtype[np.void]) -> None:
    names = declaration.names or ()
    assert {declaration[name] for name in names} == {np.dtype(np.int64)}
    assert declaration.itemsize == 8 * len(names)
    assert declaration.isalignedstruct
