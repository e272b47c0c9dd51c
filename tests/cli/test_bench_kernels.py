"""`tenora bench kernels`: what it measures is what it says, and its report has the promised shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tenora.cli.app import app
from tenora.cli.bench import kernels
from tenora.cli.bench.workload import Distribution

CPU = torch.device("cpu")


def case(**changes: Any) -> kernels.Case:
    values = {"shape": "tiny", "rows": 4, "ranks": (2, 3), "distribution": Distribution("distinct"), "seed": 0}
    return kernels.Case(**{**values, "base_share": 0.0, **changes})


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.SHAPES, "tiny", kernels.gated_decoder(kernels.Sizes(8, 12, 2, 1, 4)).sites)
    monkeypatch.setattr(kernels, "WORKING_SET", 2**12)
    monkeypatch.setattr(kernels, "PASS_SECONDS", 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapters_are_real(dtype: torch.dtype) -> None:
    bench = kernels.Bench.build(case(), kernels.SHAPES["tiny"][0], CPU, dtype)
    tables = bench.batch.tables
    assert 1 < len(bench.sites) <= kernels.MAX_LAYERS
    for site in bench.sites:
        assert [tables.rank(site.row, slot) for slot in range(4)] == [2, 3, 2, 3]
        for row in range(site.row, site.row + 3):
            assert tables.a(row, 1).dtype == torch.bfloat16
            assert tables.a(row, 1).isfinite().all()
            assert tables.bt(row, 3).any()


def test_bytes_are_those_of_true_ranks() -> None:
    group = kernels.SHAPES["tiny"][1]
    rows = 2 * (8 + 2 * 8) * 4  # x, y read, y written, float32; two rows have an adapter
    assert kernels.Bench.build(case(base_share=0.5), group, CPU, torch.float32).nbytes == (2 + 3) * (8 + 8) * 2 + rows
    alike = kernels.Bench.build(case(distribution=Distribution("identical")), group, CPU, torch.float32)
    assert alike.nbytes == 2 * (8 + 8) * 2 + 2 * rows


def test_groups_and_their_sum() -> None:
    rows = list(kernels.measure(case(), CPU, torch.float32))
    assert [row["group"] for row in rows] == ["qkv", "o", "gate_up", "down", "layer"]
    for name in ("gemm_us", "lora_us", "lora_bytes"):
        assert rows[-1][name] == pytest.approx(sum(row[name] for row in rows[:-1]))
    assert all(row["lora_us"] > 0 and row["lora_gb_per_s"] > 0 for row in rows)


def test_the_command(tmp_path: Path) -> None:
    target = tmp_path / "k.json"
    arguments = ["--shape", "tiny", "--rows", "2", "--ranks", "1,2", "--device", "cpu", "--dtype", "float32"]
    result = CliRunner().invoke(app, ["bench", "kernels", *arguments, "--json", str(target)])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].split()[:4] == ["SHAPE", "GROUP", "ROWS", "DISTRIBUTION"]
    found = json.loads(target.read_text())
    assert found["kind"] == "kernels"
    assert found["parameters"]["dtype"] == "float32"
    assert {(row["rows"], row["distribution"]) for row in found["measurements"]} == {(2, "distinct"), (2, "identical")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "gpt-9"], "no shape 'gpt-9'"),
        (["--ranks", "16,x"], "are not ranks"),
        (["--rows", "0"], "at least one row"),
        (["--distribution", "odd"], "not a distribution"),
        (["--dtype", "int8"], "dtype 'int8'"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "kernels", *arguments])
    assert result.exit_code == 1
    assert message in result.stderr
