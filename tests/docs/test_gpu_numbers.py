"""`kernels/README.md` quotes what `make gpu-check` wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

RESULT = "tests/bench/gpu/results/gpu-nvidia-h200.json"
CASES = {
    "1": "",
    "all distinct": "distinct",
    "Zipf-1.5": "zipf",
    "one": "identical",
    "one for 2,048, 64 others": "prefill+decode",
}


@pytest.fixture(scope="module")
def measured(repo_root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((repo_root / RESULT).read_text())
    return found


@pytest.fixture(scope="module")
def readme(repo_root: Path) -> str:
    return (repo_root / "kernels" / "README.md").read_text()


def test_the_file_and_the_card_are_named(readme: str, measured: dict[str, Any]) -> None:
    assert f"(../{RESULT})" in readme
    assert measured["gpu"] in readme
    assert f"{measured['copy_gb_per_s']:,.0f} GB/s" in readme


def rows_of(readme: str, heading: str) -> list[list[str]]:
    """Cells of the table under a heading row."""
    table = readme[readme.index(heading) :].partition("\n\n")[0]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_ratios_to_the_bare_gemms(readme: str, measured: dict[str, Any]) -> None:
    table = rows_of(readme, "| rows | adapters | Tenora | SGMV | `grouped_mm` |")
    assert len(table) >= 10
    for rows, adapters, *ratios in table:
        case = f"T={rows.replace(',', '')} r=16 {CASES[adapters] or 'distinct'}"
        groups = [g["us"] for g in measured["groups"] if re.fullmatch(rf"Llama-3-8B \w+ {re.escape(case)}", g["case"])]
        assert len(groups) == 4
        base = sum(us["base"] for us in groups)
        for way, ratio in zip(("ours", "sgmv", "grouped_mm"), ratios, strict=True):
            assert float(ratio) == pytest.approx(sum(us[way] for us in groups) / base, abs=0.0051), (case, way)


def test_steps_of_the_engine(readme: str, measured: dict[str, Any]) -> None:
    table = rows_of(readme, "| rows | adapters | base | with adapters | ratio | launched one by one |")
    assert len(table) >= 5
    for rows, adapters, *cells in table:
        kind = CASES[adapters] or "distinct"
        step = next(s for s in measured["engine_loop"] if (s["rows"], s["distribution"]) == (int(rows), kind))
        halves = {"base_ms": 0.051, "adapters_ms": 0.051, "ratio": 0.0051, "launched_ms": 0.51}
        for cell, (name, half) in zip(cells, halves.items(), strict=True):
            assert float(cell.removesuffix(" ms")) == pytest.approx(step[name], abs=half), (rows, adapters, name)
