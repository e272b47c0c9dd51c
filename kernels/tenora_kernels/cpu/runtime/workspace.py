"""Memory of training passes, kept from one to the next.

Fresh memory costs a page fault every 4 KiB, and what a pass over 512 tokens of SmolLM2-135M keeps is 350 MiB.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tenora_kernels import huge_pages

__all__ = ["Workspace", "cut"]

_LINE = 16  # floats of a cache line: every buffer begins at one


class Workspace:
    """Memory of training passes on one decoder; for one thread at a time."""

    def __init__(self) -> None:
        self._scratch = torch.empty(0)
        self._free: list[Tensor] = []

    def scratch(self, floats: int) -> Tensor:
        """At least so many float32, whatever they hold. The next call gives the same ones."""
        if self._scratch.numel() < floats:
            self._scratch = torch.empty(0)  # the old one goes before the new one comes
            self._scratch = huge_pages.empty(floats + floats // 8, torch.float32)
        return self._scratch

    def take(self, floats: int) -> Tensor:
        """A block of at least so many float32, until it is given back."""
        fitting = [block for block in self._free if block.numel() >= floats]
        if not fitting:
            self._free.clear()
            return huge_pages.empty(floats + floats // 8, torch.float32)
        block = min(fitting, key=torch.Tensor.numel)
        self._free = [other for other in self._free if other is not block]
        return block

    def give(self, block: Tensor) -> None:
        """Take a block back."""
        self._free.append(block)

    def release(self) -> None:
        """Free everything that is not in use."""
        self._free.clear()
        self._scratch = torch.empty(0)


def cut(sizes: Mapping[str, int], take: Callable[[int], Tensor]) -> tuple[Tensor, dict[str, int]]:
    """A block with room for buffers of so many floats each, and the address of each."""
    whole = {key: -(-size // _LINE) * _LINE for key, size in sizes.items()}
    block = take(sum(whole.values()))
    places, at = {}, block.data_ptr()
    for key, size in whole.items():
        places[key] = at
        at += 4 * size
    return block, places
