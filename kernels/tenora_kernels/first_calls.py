"""torch's functions of single numbers, called once by one thread before several threads may be the first to call them.

Intel's library, from which torch takes them on a CPU, chooses an implementation when a function is called for the first
time. Where two threads make that first call together, one of them may compute its half with the least exact one: an
error of 1.5e-4 in a cosine, in one call of the process and never again (pytorch/pytorch#188792).
"""

from __future__ import annotations

import functools

import torch

__all__ = ["FUNCTIONS", "make_first_calls"]

FUNCTIONS = ("cos", "sin", "exp", "log", "sqrt", "tanh", "erf")
"""Names in torch: what a step and a training pass call on tensors, and what torch calls for them."""


@functools.cache
def make_first_calls() -> None:
    """Call each of FUNCTIONS on one number of each type; once in a process, however often this is called."""
    for dtype in (torch.float32, torch.float64):
        number = torch.ones(1, dtype=dtype)
        for name in FUNCTIONS:
            getattr(torch, name)(number)
