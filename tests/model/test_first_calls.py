"""Of several threads that make the first call of a function of torch one may get inexact numbers: one makes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tenora.model.loading import load_decoder
from tenora_kernels.first_calls import FUNCTIONS, make_first_calls


class Calls(TorchDispatchMode):
    """What is called, on how many numbers of which type."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor):
            self.seen.append((func.overloadpacket.__name__, args[0].numel(), args[0].dtype))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decoder_has_called_every_function_on_one_number_before_its_first_step(
    make_tiny: Callable[[str], Path], dtype: torch.dtype
) -> None:
    make_first_calls.cache_clear()
    with Calls() as calls:
        load_decoder(make_tiny("smollm2"))
    for name in FUNCTIONS:
        first = next(call for call in calls.seen if call[0] == name and call[2] == dtype)
        assert first[1] == 1
