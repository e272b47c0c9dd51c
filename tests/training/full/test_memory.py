"""What a full fine-tuning needs, and what there is: of the machine, and of the container's control group."""

from __future__ import annotations

from pathlib import Path

import pytest

from tenora.errors import TrainingError
from tenora.model.loading import load_decoder
from tenora.model.spec import ModelSpec
from tenora.training.full.memory import admit, available_bytes, total_bytes
from tenora.training.full.selection import Selection, chosen_layers, needed_bytes, parameters
from tenora.training.full.weights import FullWeights

GIB = 2**30


def machine(directory: Path, cgroup: str) -> Path:
    (directory / "self").mkdir(parents=True)
    (directory / "meminfo").write_text(f"MemTotal: {16 * GIB // 1024} kB\nMemAvailable: {8 * GIB // 1024} kB\n")
    (directory / "self" / "cgroup").write_text(cgroup)
    return directory


def group(directory: Path, **files: object) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_text(f"{content}\n")


def test_without_a_limit_it_is_what_the_machine_has(tmp_path: Path) -> None:
    proc = machine(tmp_path / "proc", "0::/\n")
    group(tmp_path / "cgroup", memory__max="max", memory__current=GIB, memory__stat="inactive_file 0")
    assert available_bytes(tmp_path / "cgroup", proc) == 8 * GIB
    assert total_bytes(tmp_path / "cgroup", proc) == 16 * GIB


def test_a_group_leaves_what_is_below_its_limit_and_files_that_can_be_read_again(tmp_path: Path) -> None:
    proc = machine(tmp_path / "proc", "0::/pod/container\n")
    root = tmp_path / "cgroup"
    group(root / "pod", memory__max=4 * GIB, memory__current=3 * GIB, memory__stat=f"inactive_file {GIB}")
    group(root / "pod" / "container", memory__max=6 * GIB, memory__current=GIB, memory__stat="inactive_file 0")
    assert available_bytes(root, proc) == 2 * GIB
    assert total_bytes(root, proc) == 4 * GIB


def test_groups_of_the_first_version_are_read_too_and_paths_of_the_host_are_not_found(tmp_path: Path) -> None:
    proc = machine(tmp_path / "proc", "4:memory:/docker/1234\n3:cpu,cpuacct:/docker/1234\n")
    limits = {"memory__limit_in_bytes": 3 * GIB, "memory__usage_in_bytes": GIB, "memory__stat": "total_inactive_file 0"}
    group(tmp_path / "cgroup" / "memory", **limits)
    assert available_bytes(tmp_path / "cgroup", proc) == 2 * GIB


def test_this_machine_says_something() -> None:
    assert 0 < available_bytes() <= total_bytes()


@pytest.mark.parametrize("family", ["smollm2", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("selection", [(("all"), False, False), ("last 2", True, True), ("0", False, True)])
def test_what_is_counted_is_what_is_trained(make_tiny: object, family: str, selection: tuple[str, bool, bool]) -> None:
    base: Path = make_tiny(family)  # type: ignore[operator]
    spec = ModelSpec.from_directory(base)
    chosen = Selection(chosen_layers(selection[0], spec.num_layers), *selection[1:])
    decoder = load_decoder(base)
    assert parameters(spec) * 4 == decoder.nbytes - 4 * extra_head_norms(spec)
    assert FullWeights(decoder, chosen).numel == chosen.trained(spec)


def extra_head_norms(spec: ModelSpec) -> int:
    """The decoder has a row for each head, the checkpoint one for all."""
    heads = sum(count - 1 for block in spec.layout.blocks for _, count in block.head_norms)
    return spec.num_layers * spec.head_dim * heads


def test_a_run_that_does_not_fit_is_told_the_bytes(tiny_base: Path) -> None:
    spec = ModelSpec.from_directory(tiny_base)
    selection = Selection((0, 1, 2), embeddings=False, norms=False)
    needed = needed_bytes(spec, selection, 100)
    admit(spec, selection, 100, needed)
    with pytest.raises(
        TrainingError, match=f"needs {needed:,} bytes of memory .* and {needed - 1:,} are available"
    ) as told:
        admit(spec, selection, 100, needed - 1)
    assert told.value.code == "insufficient_memory"
    assert needed_bytes(spec, selection, 10_000) > needed
