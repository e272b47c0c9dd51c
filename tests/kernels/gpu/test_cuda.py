"""The kernels on a real device, against the float64 reference. `make gpu-check` runs them before it measures."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from tenora_kernels.gpu import backend
from tenora_kernels.gpu.context import GpuLora
from tenora_kernels.layout import LoraSite
from tests.kernels.cases import DOWN, GATE_UP, PARTIAL, QKV, TOLERANCE, Case, make_case, shuffled, worst
from tests.kernels.gpu.cases import LAYOUTS, batch_of, edit, forward, reference
from tests.kernels.test_gradients import reference_gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

RANKS = [[r] * 7 for r in (1, 4, 8, 16, 33, 64, 128, 256)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TYPES = [(dtype, dtype) for dtype in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
"""Of the rows and of the weights."""
SITES = {"qkv": QKV, "gate_up": GATE_UP, "down": DOWN}


def on_device(case: Case) -> Case:
    """The same case with its tensors on the GPU; the reference is computed on the CPU before."""
    case.x, case.y = case.x.cuda(), case.y.cuda()
    case.tables.arena = case.tables.arena.cuda()
    if case.tables.grad is not None:
        case.tables.grad = case.tables.grad.cuda()
    case.tables.version += 1
    return case


@pytest.mark.parametrize(("dtype", "weights"), TYPES, ids=str)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("rows", [0, 1, 8, 40, 256, 257, 512])
def test_equals_the_reference(rows: int, site: str, dtype: torch.dtype, weights: torch.dtype) -> None:
    case = make_case(shuffled(rows, len(RANKS), rows), RANKS, site=SITES[site], dtype=dtype, weights=weights)
    wanted = reference(case)
    on_device(case)
    got = forward(case)
    assert worst(got.cpu(), wanted) <= TOLERANCE[dtype]
    base = [t for t, slot in enumerate(case.slots) if slot < 0]
    assert torch.equal(got[base], case.y[base])
    assert torch.equal(got, forward(case)), "equal arguments, other bits"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, dtype: torch.dtype) -> None:
    case = make_case(*LAYOUTS[layout], dtype=dtype)
    wanted = reference(case)
    on_device(case)
    if case.slots:
        assert worst(forward(case).cpu(), wanted) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_of_skipped_modules_keep_their_bits(dtype: torch.dtype) -> None:
    case = on_device(make_case(shuffled(32, 4, 3), PARTIAL, dtype=dtype))
    got = forward(case)
    for t, slot in enumerate(case.slots):
        for j, (start, stop) in enumerate(QKV.slices):
            changed = not torch.equal(got[t, start:stop], case.y[t, start:stop])
            assert changed == (slot >= 0 and PARTIAL[slot][j] > 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mutations_exceed_the_tolerance(dtype: torch.dtype) -> None:
    case = make_case(shuffled(40, 6, 1), RANKS[:6], dtype=dtype)
    wanted = reference(case)
    on_device(case)

    def error() -> float:
        return worst(forward(case).cpu(), wanted)

    assert error() <= TOLERANCE[dtype]
    row = next(t for t, slot in enumerate(case.slots) if slot == 3)
    case.slots[row] = 2
    assert error() > 2 * TOLERANCE[dtype], "a wrong slot went unseen"
    case.slots[row] = 3
    scale = case.tables.scale(1, 3)
    edit(case, "scaling", 1, 3, scale * 1.25)
    assert error() > 2 * TOLERANCE[dtype], "a wrong scale went unseen"
    edit(case, "scaling", 1, 3, scale)
    edit(case, "ranks", 2, 5, 63)
    assert error() > 2 * TOLERANCE[dtype], "a missing rank went unseen"


@pytest.mark.parametrize(("dtype", "weights"), TYPES, ids=str)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("rows", [0, 40, 300])
def test_gradients(rows: int, site: str, dtype: torch.dtype, weights: torch.dtype) -> None:
    """Of equal types those of training: dY, x and weights of the base's type, gradients in float32."""
    case = make_case(shuffled(rows, 6, rows), RANKS[:6], site=SITES[site], dtype=dtype, weights=weights, train=True)
    generator = torch.Generator().manual_seed(5)
    dy = torch.randn(rows, case.width(), generator=generator, dtype=torch.float64).to(dtype)
    wanted_dx, _, wanted_arena = reference_gradients(case, dy)
    on_device(case)
    dx = torch.zeros(case.x.shape, dtype=torch.float32, device="cuda")
    backend.backward(dy.cuda(), case.x, case.site, batch_of(case), dx)
    assert worst(dx.cpu(), wanted_dx) <= TOLERANCE[torch.float32]
    assert case.tables.grad is not None
    assert worst(case.tables.grad.cpu(), wanted_arena) <= TOLERANCE[torch.float32]
    once = case.tables.grad.clone()
    case.tables.grad.zero_()
    backend.backward(dy.cuda(), case.x, case.site, batch_of(case), None)
    assert torch.equal(case.tables.grad, once), "equal arguments, other bits"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [40, 400])
def test_a_graph_replays_with_any_mix(rows: int, dtype: torch.dtype) -> None:
    """Captured with one adapter in all rows; replayed with all of them, with base rows, after an adapter changed."""
    case = on_device(make_case([0] * rows, RANKS, dtype=dtype))
    prepared = GpuLora(case.tables, max_rows=rows, max_rank=256, align=1)
    slots = torch.zeros(rows, dtype=torch.int32, device="cuda")
    y, start = case.y.clone(), case.y.clone()

    def step(site: LoraSite) -> None:
        y.copy_(start)
        backend.forward(y, case.x, site, prepared.batch(slots))

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        step(QKV)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(QKV)
    generator = random.Random(3)
    for mix in (
        [t % len(RANKS) for t in range(rows)],
        [-1] * rows,
        [generator.randrange(-1, len(RANKS)) for _ in range(rows)],
    ):
        slots.copy_(torch.tensor(mix, dtype=torch.int32))
        graph.replay()
        case.slots = mix
        assert worst(y.cpu(), cpu_reference(case, start)) <= TOLERANCE[dtype]
    case.tables.clear(2)
    assert prepared.refresh()
    graph.replay()
    assert worst(y.cpu(), cpu_reference(case, start)) <= TOLERANCE[dtype]


def cpu_reference(case: Case, y: Tensor) -> Tensor:
    """The float64 result of a case whose tensors are on the GPU."""
    arena = case.tables.arena
    case.tables.arena = arena.cpu()
    try:
        return reference(Case(y.cpu(), case.x.cpu(), case.site, case.tables, case.slots))
    finally:
        case.tables.arena = arena


def test_nothing_of_a_step_waits_for_the_device() -> None:
    case = on_device(make_case(shuffled(40, 6, 1), RANKS))
    prepared = GpuLora(case.tables, max_rows=40, max_rank=256, align=1)
    slots = torch.tensor(case.slots, device="cuda")
    y = case.y.clone()
    backend.forward(y, case.x, QKV, prepared.batch(slots))  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.tables.clear(1)
        prepared.refresh()
        backend.forward(y, case.x, QKV, prepared.batch(slots))
    finally:
        torch.cuda.set_sync_debug_mode("default")
