"""`python -m tests.bench.gpu.check`: tests on the device, then the benchmark; a JSON file with the GPU's name.

Exit status: 0 when everything ran, 1 when a test failed (nothing is then measured), 3 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

NO_GPU = 3
TESTS = (
    "tests/kernels/gpu/test_cuda.py",
    "tests/kernels/gpu/test_cuda_paged.py",
    "tests/engine/test_gpu.py",
    "tests/engine/test_clock.py",
    "tests/engine/test_decode_graphs.py",
    "tests/training/test_gpu.py",
)
REPO = Path(__file__).resolve().parents[3]


def main(arguments: list[str] | None = None) -> int:
    """Run the check; returns the exit status."""
    options = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print("There is no GPU on this machine: nothing was tested and nothing measured.")
        return NO_GPU
    gpu = torch.cuda.get_device_name()
    print(f"Testing on {gpu}.", flush=True)
    if not options.skip_tests:
        command = [sys.executable, "-m", "pytest", "-q", *TESTS]
        if subprocess.run(command, cwd=REPO, check=False).returncode:
            print("The tests failed; nothing is measured.")
            return 1
    path = options.out or Path(f"gpu-{slug(gpu)}.json")
    for report in measured(gpu, seconds=options.seconds):
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(summary(report))
    print(f"Written to {path}.")
    return 0


def measured(gpu: str, *, seconds: float) -> Iterator[dict[str, Any]]:
    """The report as it grows, in order of importance, until `seconds` have passed; yielded after every case."""
    from tests.bench.gpu import decode_loop, groups, service, timing
    from tests.bench.gpu.protocol import decode_cases, prefill_cases

    started = time.monotonic()
    bandwidth = timing.copy_bandwidth()
    report: dict[str, Any] = {
        "gpu": gpu,
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "groups": [],
        "left_out": [],
    }
    for name, found in service.items():
        report[name] = found
        yield report
    report["decode_loop"] = decode_loop.run()
    torch.cuda.empty_cache()
    yield report
    for case in (*decode_cases(), *prefill_cases()):
        if time.monotonic() - started > seconds:
            report["left_out"].append(case.name)
            continue
        result = groups.run(case, bandwidth)
        print(f"{result['case']}: " + ", ".join(f"{k} {v:.3f}" for k, v in result["ratio"].items()), flush=True)
        report["groups"].append(result)
        torch.cuda.empty_cache()
        yield report
    yield report


def summary(report: dict[str, Any]) -> str:
    """The two loops as tables in Markdown, then the other items as they are."""
    lines = [f"{report['gpu']}, copy {report['copy_gb_per_s']} GB/s"]
    columns = ("ratio", "adapters_ms", "base_ms")
    for name, shown in (
        ("decode_loop", columns),
        ("engine_loop", (*columns, "any_rank_ms", "launched_ms", "tokens_per_s")),
    ):
        lines += ["", f"| {name}: rows | adapters | {' | '.join(shown)} |", "| --- " * (len(shown) + 2) + "|"]
        for row in report[name]:
            if "skipped" in row:
                lines.append(row["skipped"])
                continue
            figures = " | ".join(str(row[column]) for column in shown)
            lines.append(f"| {row['rows']} | {row['adapters']} ({row['distribution']}) | {figures} |")
    for name in ("mixed_steps", "training_pass", "streams"):
        lines += ["", f"{name}: {json.dumps(report.get(name), indent=1)}"]
    return "\n".join(lines)


def slug(gpu: str) -> str:
    """A GPU's name for a file."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu.check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="the file to write; default gpu-NAME.json")
    parser.add_argument("--skip-tests", action="store_true", help="measure only")
    parser.add_argument("--seconds", type=float, default=1500, help="begin no case after this time; default 1500")
    return parser


if __name__ == "__main__":
    sys.exit(main())
