"""Frozen weights read the other way, for the gradient of a product's input: dX = dY · W.

The panels of `gemm.PackedMatrix` run along the input of the product. Its gradient sums along the output, so that panels
along the output are wanted: a few MiB of scratch, in the type of the weights, that are filled when a layer's backward
pass needs them. That takes 2 % of its time; a second packed copy of the base would cost its whole size again.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types, uint32
from numba.extending import intrinsic

from tenora_kernels.cpu.products.product import MAX_ROWS, PANEL, bytes_of, multiply
from tenora_kernels.cpu.runtime.compiled import compiled
from tenora_kernels.cpu.runtime.vectors import LANES, Vectors, integer

__all__ = ["multiply_transposed", "transpose_task", "transpose_tasks"]

DEPTH_BLOCK = 384
"""Lines of a panel that are used at once: with the rows beside them they stay in the first-level cache."""

TASK_PANELS = 4
"""Panels of the packed matrix that one task turns."""


def _transpose(builder: Any, rows: list[Any]) -> list[Any]:
    """The LANES columns of LANES vectors: block after block of 2, 4, … changes places across the diagonal."""
    kind, rows, size = ir.VectorType(ir.IntType(32), LANES), list(rows), 1
    while size < LANES:
        low = [lane if not lane & size else LANES + lane - size for lane in range(LANES)]
        high = [lane + size if not lane & size else LANES + lane for lane in range(LANES)]
        for i in range(LANES):
            if not i & size:
                a, b = rows[i], rows[i + size]
                rows[i] = builder.shuffle_vector(a, b, ir.Constant(kind, low))
                rows[i + size] = builder.shuffle_vector(a, b, ir.Constant(kind, high))
        size *= 2
    return rows


@intrinsic
def _turn(typing: Any, source: Any, target: Any, sample: Any) -> Any:
    """Turn PANEL lines of a panel at `source`: line j of the panel at `target` is column j of those lines."""
    is_bf16 = sample == uint32
    signature = types.void(types.int64, types.int64, sample)

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        code = Vectors(builder)
        line = PANEL * (2 if is_bf16 else 4)

        def columns(first: int, offset: int) -> list[Any]:
            """Columns of LANES lines from `first` on, as integers."""
            places = [builder.add(args[0], integer((first + i) * line + offset)) for i in range(LANES)]
            return [
                builder.bitcast(transposed, code.integers)
                for transposed in _transpose(builder, [*map(code.load, places)])
            ]

        def write(values: list[Any], first: int, offset: int) -> None:
            for j, value in enumerate(values):
                place = builder.add(args[1], integer((first + j) * line + offset))
                code.store(builder.bitcast(value, code.kind), place)

        def constant(value: int) -> Any:
            return ir.Constant(code.integers, [value] * LANES)

        if not is_bf16:
            for half in range(2):
                for part in range(2):
                    write(columns(part * LANES, half * LANES * 4), half * LANES, part * LANES * 4)
            return context.get_dummy_value()
        # A pair holds columns j and j + LANES; transposed, it has to hold lines i and i + LANES.
        upper, lower = columns(0, 0), columns(LANES, 0)
        low, high, shift = constant(0xFFFF), constant(0xFFFF0000), constant(16)
        pairs = list(zip(upper, lower, strict=True))
        write([builder.or_(builder.and_(a, low), builder.shl(b, shift)) for a, b in pairs], 0, 0)
        write([builder.or_(builder.lshr(a, shift), builder.and_(b, high)) for a, b in pairs], LANES, 0)
        return context.get_dummy_value()

    return signature, codegen


@compiled()
def transpose_tasks(panels):
    """Into how many tasks the turning of so many panels is cut."""
    return (panels + TASK_PANELS - 1) // TASK_PANELS


@compiled()
def transpose_task(task, w, first, panels, depth, out, sample):
    """Turn some of `panels` panels, from panel `first` of w on, into panels of the other side.

    Args:
        task: 0 … transpose_tasks(panels) - 1.
        w: address of panel 0 of the packed matrix, each [depth] lines.
        first, panels: which of them.
        depth: a multiple of PANEL.
        out: address of [depth / PANEL, panels · PANEL] lines: panels as `multiply_transposed` reads them.
        sample: of the packed matrix.
    """
    lines, line = panels * PANEL, PANEL * bytes_of(sample)
    for panel in range(task * TASK_PANELS, min(panels, (task + 1) * TASK_PANELS)):
        source = w + (first + panel) * depth * line
        for k in range(0, depth, PANEL):
            _turn(source + k * line, out + (k // PANEL * lines + panel * PANEL) * line, sample)


@compiled()
def multiply_transposed(x, x_step, rows, w, first, last, depth, out, out_step, add, sample):
    """out[0:rows, panels first … last - 1] (+)= x · w for transposed panels of `depth` lines, some lines at a time."""
    blocks, line = (rows + MAX_ROWS - 1) // MAX_ROWS, PANEL * bytes_of(sample)
    for begin in range(0, depth, DEPTH_BLOCK):
        size, adds = min(DEPTH_BLOCK, depth - begin), 1 if begin > 0 else add
        for panel in range(first, last):
            here = w + (panel * depth + begin) * line
            # The next panel comes into the cache while the first rows are multiplied with this one.
            ahead = here + depth * line if panel + 1 < last else here
            for block in range(blocks):
                start, stop = rows * block // blocks, rows * (block + 1) // blocks
                multiply(
                    stop - start, x + start * x_step + begin * 4, x_step, here, size, ahead if block == 0 else here,
                    out + start * out_step + panel * PANEL * 4, out_step, adds, sample,
                )  # fmt: skip
