"""Every kernel in every configuration compiles for every architecture, within its budget. Needs no GPU.

The interpreter accepts code that the compiler rejects; and a spill, or a register too many for four programs on a
multiprocessor, costs more than most changes gain.
"""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from tenora_kernels.gpu import configs
from tests.bench.gpu import peers
from tests.bench.gpu.peers import Sgmv
from tests.kernels.gpu.aot import BUDGETS, TARGETS, compile_all, compile_launch, with_slack
from tests.kernels.gpu.launches import EVERYTHING, Launch, Recorder, all_launches
from tests.support.full import full_but

TABLE: dict[str, dict[str, dict[str, int]]] = json.loads(BUDGETS.read_text())
PRODUCTS = ("shrink", "expand", "expand_joint", "lora_wgrad", "paged_decode")
# Bytes of shared memory that one program may have.
LARGEST = {"sm80": 166_912, "sm90": 232_448, "sm100": 232_448, "gfx942": 65_536}


@pytest.fixture(scope="module")
def cache(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Triton keeps its output between runs; it knows by itself what has changed."""
    kept = pytestconfig.cache
    return tmp_path_factory.mktemp("triton") if kept is None else kept.mkdir("triton")


def check_budget(measured: dict[str, dict[str, int]], budget: dict[str, dict[str, int]]) -> None:
    over = {
        title: (taken, budget[title])
        for title, taken in measured.items()
        if any(taken[name] > budget[title][name] for name in ("registers", "stack", "shared"))
    }
    assert not over, f"over budget (taken, budget): {over}"
    lost = [title for title, taken in measured.items() if budget[title]["mma"] and not taken["mma"]]
    assert not lost, f"no longer on the tensor cores: {lost}"


def test_each_kernel_compiles_within_its_budget() -> None:
    """Its first configuration, for one architecture; `make test-full` compiles the others."""
    first = {launch.name: launch for launch in reversed(all_launches("sm90"))}
    assert set(first) == set(EVERYTHING)
    check_budget({launch.title: compile_launch(launch, "sm90") for launch in first.values()}, TABLE["sm90"])


@pytest.mark.full
@pytest.mark.parametrize("arch", TARGETS)
def test_everything_compiles_within_its_budget(arch: configs.Arch, cache: Path) -> None:
    measured = compile_all(arch, cache)
    assert set(measured) == set(TABLE[arch]), "run `python -m tests.kernels.gpu.aot` and read the difference"
    check_budget(measured, TABLE[arch])


@pytest.mark.parametrize("arch", TARGETS)
def test_the_budgets_are_ones_to_live_in(arch: configs.Arch) -> None:
    for title, budget in TABLE[arch].items():
        assert budget["shared"] <= LARGEST[arch], title
        if "decode" in title:
            assert budget["stack"] == 0, f"{title} spills"


@pytest.mark.parametrize("arch", TARGETS)
def test_products_of_two_byte_types_run_on_the_tensor_cores(arch: configs.Arch) -> None:
    """What serves and what trains: `test_arena.py` looks which types those are. float32 weights would not."""
    products = {title: budget for title, budget in TABLE[arch].items() if title.split(",")[0] in PRODUCTS}
    two_bytes = {title for title in products if not title.endswith("float32")}
    assert two_bytes & {title for title in products if "backward" in title}
    assert not {title for title in two_bytes if products[title]["mma"] == 0}


@pytest.mark.parametrize("arch", TARGETS)
def test_every_kernel_is_among_them(arch: configs.Arch) -> None:
    launches = all_launches(arch)
    assert {launch.name for launch in launches} == set(EVERYTHING)
    assert {launch.title for launch in launches} == set(TABLE[arch])


def test_a_budget_leaves_little() -> None:
    taken = {"registers": 122, "stack": 0, "shared": 100, "mma": 4}
    assert with_slack(taken) == {"registers": 128, "stack": 0, "shared": 100, "mma": 4}
    assert with_slack({**taken, "registers": 125})["registers"] == 136


@pytest.mark.parametrize("arch", full_but("sm90", ["sm80", "sm90"]))
def test_the_kernels_we_are_compared_with_compile(arch: configs.Arch) -> None:
    launches: list[Launch] = []

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def indices(count: int) -> torch.Tensor:
        return empty(count, dtype=torch.int32)

    peer = Sgmv(empty(3, 8, 64, 4096), empty(3, 8, 4096, 64), indices(32), indices(9), indices(3), indices(3), 4)
    with (
        mock.patch.object(peers, "sgmv_shrink", Recorder(peers.sgmv_shrink, "peer", launches)),
        mock.patch.object(peers, "sgmv_expand", Recorder(peers.sgmv_expand, "peer", launches)),
    ):
        peer.add(empty(32, 6144), empty(32, 4096), empty(3, 32, 64, dtype=torch.float32))
    assert [launch.name for launch in launches] == ["sgmv_shrink", "sgmv_expand"]
    for launch in launches:
        assert compile_launch(launch, arch)["stack"] == 0
