"""Compilation ahead of the first request: what is planned, how it goes on after an end, and who waits for whom."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tenora_kernels.cpu.decoder import step
from tenora_kernels.cpu.precompile import Wanted, plan, wait_for_others
from tenora_kernels.cpu.products import gemm
from tenora_kernels.cpu.runtime import cache, team
from tenora_kernels.cpu.runtime.cache import Progress
from tenora_kernels.cpu.runtime.levels import LEVELS, best_level, target_features
from tenora_kernels.cpu.runtime.watch import reachable
from tests.support.patience import PATIENCE

SMALL = """
import json, sys
import torch
from numba import types
from tenora_kernels.cpu.products import gemm
from tenora_kernels.cpu.runtime import team
from tenora_kernels.cpu.products.gemm import BF16_PANELS
from tenora_kernels.cpu.precompile import Job, precompile
from numba import typeof
torch.set_num_threads(1)
jobs = [Job(kernel, (types.int64,)) for kernel in team.JOBS]
if sys.argv[1] == "more":
    jobs.append(Job(gemm._unpack_job, (*[types.int64] * 6, typeof(BF16_PANELS))))
told = []
precompile(jobs, 2, told.append)
print(json.dumps([told[0], told[-1]]))
"""
WARM_UP = """
import torch
from tenora_kernels.cpu.decoder import layers, losses
from tenora_kernels.cpu.lowrank import lora
from tenora_kernels.cpu.precompile import Wanted, _smallest
from tenora_kernels.cpu.runtime.watch import watching
compiled = []
stack = _smallest(Wanted(torch.float32, True, True, 64, True))
with watching(compiled.append):
    stack.warm_up(train=True)
    layers.warm_up(stack)
    losses.warm_up(stack)
    lora.warm_up(torch.float32, train=True)
print(len(compiled))
"""


def run(program: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    cache.writable.cache_clear()
    yield tmp_path
    cache.writable.cache_clear()


@pytest.fixture
def fresh(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that finds the kernels' sources without what was ever compiled of them."""
    package = tmp_path / "site"
    package.mkdir()
    shutil.copytree(Path(cache.__file__).parents[2], package / "tenora_kernels", ignore=lambda *_: {"__pycache__"})
    path = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.full
def test_a_second_try_goes_on_where_the_first_one_was_ended(tmp_path: Path, fresh: dict[str, str]) -> None:
    fresh["NUMBA_CACHE_DIR"] = str(tmp_path / "cache")
    first, last = json.loads(run(SMALL, "few", **fresh))
    assert (first, last) == ([0, 3, 0], [3, 3, 0])
    first, last = json.loads(run(SMALL, "more", **fresh))
    total = first[1]
    assert first == [3, total, 3]
    assert last == [total, total, 3]
    assert json.loads(run(SMALL, "more", **fresh)) == [[total, total, total]] * 2


def test_kernels_that_came_with_the_code_are_read_where_nothing_can_be_written(
    tmp_path: Path, fresh: dict[str, str]
) -> None:
    """As in an image: the package is read-only, and the volume is empty."""
    environment = fresh
    level = best_level()
    if level is not None:  # compiled for the level, found by the processor
        levels = {"NUMBA_CPU_NAME": level, "NUMBA_CPU_FEATURES": LEVELS[level]}
        assert json.loads(run(SMALL, "few", **environment, **levels))[0] == [0, 3, 0]
    else:
        assert json.loads(run(SMALL, "few", **environment))[0] == [0, 3, 0]
    elsewhere = {**environment, "NUMBA_CACHE_DIR": str(tmp_path / "volume")}
    assert json.loads(run(SMALL, "few", **elsewhere))[0] == [3, 3, 3]


def test_after_it_nothing_is_left_to_compile_for_a_packed_base() -> None:
    wanted = "Wanted(torch.float32, True, True, 64, True)"
    run(
        "import torch; from tenora_kernels.cpu.precompile import *; torch.set_num_threads(1);"
        f"precompile(plan({wanted}), 2, lambda _: None)"
    )
    assert run(WARM_UP).strip() == "0"


def test_a_role_that_never_trains_plans_no_training_kernel() -> None:
    names = {job.kernel.__name__ for job in plan(Wanted(torch.float32, True, True, 64, False))}
    assert {"run_step", "_matmul_job"} <= names
    assert not {"forward_layer", "backward_layer", "gradient_job", "input_job"} & names
    assert {"backward_layer", "weight_job"} <= {
        job.kernel.__name__ for job in plan(Wanted(torch.float32, True, True, 64, True))
    }
    modules = {job.kernel.__name__ for job in plan(Wanted(torch.bfloat16, False, False, 64, False))}
    assert {"attend_job", "forward_job"} <= modules
    assert "run_step" not in modules


def test_planning_computes_nothing_and_is_over_with_its_block() -> None:
    with team.noting() as noted:
        team.Team(1).run(gemm._unpack_job, 1, 0, 10, 10, 10, 0, gemm.BF16_PANELS)  # would write at address 0
    assert [kernel for kernel, _ in noted] == [gemm._unpack_job]
    weight = gemm.PackedMatrix.pack(torch.ones(gemm.PANEL, 4))
    assert torch.equal(gemm.unpack(weight, team.Team(1)), torch.ones(gemm.PANEL, 4))


def test_the_kernels_of_a_job_are_those_that_it_names_and_those_that_they_name() -> None:
    kernels = reachable([step.run_step])
    assert {step.run_step, step._norm, team.claim, gemm.multiply_rows} <= kernels
    assert reachable([team.complete]) == {team.complete}


def test_a_kernel_without_an_entry_for_python_says_so() -> None:
    with pytest.raises(TypeError, match="claim can be called by other kernels only"):
        team.claim(0, 0, 0)


def test_who_waits_for_a_compilation_hears_how_far_it_is_and_goes_on_at_its_end(directory: Path) -> None:
    assert cache.read_progress() is None
    descriptor = cache.under_way()
    assert descriptor is not None
    assert cache.under_way() is None  # one at a time
    cache.write_progress(descriptor, Progress(42, 140, 38))
    told: list[tuple[int, int, int]] = []
    heard = threading.Event()

    def report(*numbers: int) -> None:
        told.append(numbers)  # type: ignore[arg-type]
        heard.set()

    waiting = threading.Thread(target=wait_for_others, args=(report,))
    waiting.start()
    assert heard.wait(PATIENCE)
    assert waiting.is_alive()
    os.close(descriptor)
    waiting.join(PATIENCE)
    assert not waiting.is_alive()
    assert set(told) == {(42, 140, 38)}


def test_a_level_is_one_whose_every_feature_is_there() -> None:
    level = best_level()
    if level is not None:
        assert all(target_features()[part[1:]] for part in LEVELS[level].split(","))
    assert LEVELS["x86-64-v4"].startswith(LEVELS["x86-64-v3"])


def test_everything_compiled_is_noted_for_this_processor_and_these_settings(directory: Path) -> None:
    assert not cache.complete("a")
    cache.note_complete("a")
    assert cache.complete("a")
    assert not cache.complete("b")
