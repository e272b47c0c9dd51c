"""The low-rank op in plain torch: matmuls per segment and slice. Runs on every device that torch runs on."""

from __future__ import annotations

from torch import Tensor

from tenora_kernels.layout import LoraBatch, LoraSegments, LoraSite, accumulation_dtype


def forward(y: Tensor, x: Tensor, site: LoraSite, batch: LoraBatch) -> None:
    """Add the low-rank term to y in place: `y[t, slice] += c · (x[t]·Aᵀ)·Bᵀ` for every row that has an adapter.

    Sums are float32 (float64 if an operand is); y is rounded once, at the end.

    Args:
        y: [T, out] with unit column stride; only adapted rows are written.
        x: [T, in], not aliasing y.
        site: whose modules adapt y.
        batch: tables and segments of this step.
    """
    tables, segments = batch.tables, batch.segments
    if not segments.seg_slot or not _adapts(site, batch):
        return
    dtype = accumulation_dtype(y.dtype, x.dtype, tables.arena.dtype)
    inputs = _gather(x, segments).to(dtype)
    # A view of y where y may be summed into directly, else a copy that is written back.
    direct = segments.first is not None and y.dtype == dtype
    outputs = _gather(y, segments).to(dtype)
    for i, slot in enumerate(segments.seg_slot):
        start, stop = segments.seg_ptr[i], segments.seg_ptr[i + 1]
        for j, (left, right) in enumerate(site.slices):
            row = site.row + j
            if tables.rank(row, slot) == 0:
                continue
            shrunk = inputs[start:stop] @ tables.a(row, slot).to(dtype).t()
            outputs[start:stop, left:right].addmm_(
                shrunk, tables.bt(row, slot).to(dtype), alpha=tables.scale(row, slot)
            )
    if not direct:
        _scatter(y, outputs, segments)


def backward(dy: Tensor, x: Tensor, site: LoraSite, batch: LoraBatch, dx: Tensor | None) -> None:
    """Add the gradients of `forward` to dx and, if the tables train, to `tables.grad`.

    With S = x·Aᵀ and dS = c·dY·B: dX += dS·A, dA += dSᵀ·X, dBᵀ += c·Sᵀ·dY.

    Args:
        dy: [T, out], the gradient of y.
        x: [T, in], the input of the forward pass.
        site: whose modules adapt y.
        batch: tables and segments of the forward pass, unchanged since.
        dx: [T, in] in the accumulation dtype; only adapted rows are written. None if nobody wants it.
    """
    tables, segments = batch.tables, batch.segments
    if not segments.seg_slot or not _adapts(site, batch):
        return
    dtype = accumulation_dtype(dy.dtype, x.dtype, tables.arena.dtype)
    inputs, d_outputs = _gather(x, segments).to(dtype), _gather(dy, segments).to(dtype)
    d_inputs = None if dx is None else _gather(dx, segments)
    for i, slot in enumerate(segments.seg_slot):
        start, stop = segments.seg_ptr[i], segments.seg_ptr[i + 1]
        segment = inputs[start:stop]
        for j, (left, right) in enumerate(site.slices):
            row, d_segment = site.row + j, d_outputs[start:stop, left:right]
            if tables.rank(row, slot) == 0:
                continue
            scale, a = tables.scale(row, slot), tables.a(row, slot).to(dtype)
            d_shrunk = (d_segment @ tables.bt(row, slot).to(dtype).t()).mul_(scale)
            if d_inputs is not None:
                d_inputs[start:stop].addmm_(d_shrunk, a)
            if tables.grad is not None:
                tables.grad_a(row, slot).add_(d_shrunk.t() @ segment)
                tables.grad_bt(row, slot).add_((segment @ a.t()).t() @ d_segment, alpha=scale)
    if dx is not None and d_inputs is not None and segments.first is None:
        _scatter(dx, d_inputs, segments)


def _adapts(site: LoraSite, batch: LoraBatch) -> bool:
    """Whether any slot of the batch adapts any module of the site."""
    rank = batch.tables.rank
    return any(rank(site.row + j, slot) for j in range(len(site.slices)) for slot in batch.segments.seg_slot)


def _gather(rows: Tensor, segments: LoraSegments) -> Tensor:
    """Adapted rows in segment order: a view if they are a run already, else a copy."""
    if segments.first is not None:
        return rows[segments.first : segments.first + segments.adapted]
    return rows.index_select(0, segments.perm)


def _scatter(rows: Tensor, values: Tensor, segments: LoraSegments) -> None:
    """Write segment-ordered values back to their rows, rounding to the rows' dtype."""
    if segments.first is not None:
        rows[segments.first : segments.first + segments.adapted].copy_(values)
    else:
        rows.index_copy_(0, segments.perm, values.to(rows.dtype))
