"""Compiled functions that are called through their address.

Numba copies what a compiled function calls into it, and optimises the copy again at every level of the calls. For an
inner loop that a whole job is made of that is most of a minute of compilation; called by address it is compiled once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tenora_kernels.cpu.runtime.compiled import callback

__all__ = ["address_of", "caller"]


def address_of(function: Callable[..., None], signature: Any) -> int:
    """Compile a function that returns nothing, or read it from the cache on disk, and tell where it lies.

    The code lives as long as the process. `function` is plain Python as Numba takes it, and never raises.
    """
    compiled = callback(function, signature)
    _kept.append(compiled)
    return int(compiled.address)


_kept: list[Any] = []


def caller(signature: Any) -> Any:
    """An intrinsic `call(address, arguments)` for functions of a signature; the arguments are a tuple."""
    kinds = types.Tuple(signature.args)

    @intrinsic
    def call(typing: Any, address: Any, arguments: Any) -> Any:
        def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            wanted = [context.get_value_type(kind) for kind in signature.args]
            pointer = ir.FunctionType(ir.VoidType(), wanted).as_pointer()
            values = [builder.extract_value(args[1], number) for number in range(len(wanted))]
            builder.call(builder.inttoptr(args[0], pointer), values)
            return context.get_dummy_value()

        return types.void(types.int64, kinds), codegen

    return call
