"""Runs a compiled job on the threads of torch's own pool, from compiled code.

torch and Numba each bring an OpenMP runtime, and the idle threads of one spin on the cores that the other wants. The
runtime that torch has loaded is asked instead: a start costs about a microsecond, and torch's next operation finds its
threads warm.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

__all__ = ["call", "call_parallel", "gomp_parallel"]

_I32, _BYTES = ir.IntType(32), ir.IntType(8).as_pointer()


@functools.cache
def gomp_parallel() -> int:
    """The address of `GOMP_parallel` in the runtime that torch uses; 0 if torch was built with another one."""
    folder = Path(torch.__file__).parent / "lib"
    if not sys.platform.startswith("linux"):
        return 0
    try:
        # Looked up through torch's library, so that it is found in what torch itself depends on.
        function = ctypes.CDLL(str(folder / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@intrinsic
def call_parallel(typing: Any, run: Any, job: Any, argument: Any, threads: Any) -> Any:
    """`GOMP_parallel(job, argument, threads, 0)` at address `run`: `job(argument)` on every thread, then a barrier."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        job = ir.FunctionType(ir.VoidType(), [_BYTES]).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [job, _BYTES, _I32, _I32]).as_pointer()
        builder.call(
            builder.inttoptr(args[0], kind),
            [
                builder.inttoptr(args[1], job),
                builder.inttoptr(args[2], _BYTES),
                builder.trunc(args[3], _I32),
                ir.Constant(_I32, 0),
            ],
        )
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp), codegen


@intrinsic
def call(typing: Any, job: Any, argument: Any) -> Any:
    """`job(argument)` on the calling thread, at an address: the job's code is not copied into the caller."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_BYTES]).as_pointer()
        builder.call(builder.inttoptr(args[0], kind), [builder.inttoptr(args[1], _BYTES)])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen
