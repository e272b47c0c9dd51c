"""Ahead-of-time compilation of recorded launches, and what the machine code takes; needs no GPU.

`python -m tests.kernels.gpu.aot` compiles everything and rewrites `budgets.json`, which `test_aot.py` enforces. Do that
after a deliberate change of a kernel or a table, and read the difference.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tenora_kernels.gpu import configs
from tests.kernels.gpu.launches import Launch, all_launches

TARGETS: dict[configs.Arch, GPUTarget] = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BUDGETS = Path(__file__).with_name("budgets.json")
PROCESSES = 2
_MMA = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_s?mfma_)")
_CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


def compile_launch(launch: Launch, arch: configs.Arch) -> dict[str, int]:
    """Registers, stack, shared memory and instructions of the tensor cores, in units of one thread and bytes.

    On gfx942 registers are vector registers, and the stack is the private segment plus spilled vector registers; scalar
    ones spill into vector registers, not into memory.
    """
    compiled = compile_kernel(launch, arch)
    text = compiled.asm["amdgcn" if arch == "gfx942" else "ptx"]
    taken = _hip(compiled) if arch == "gfx942" else _cuda(compiled)
    return {"shared": int(compiled.metadata.shared), **taken, "mma": len(_MMA.findall(text))}


def compile_kernel(launch: Launch, arch: configs.Arch) -> Any:
    """Triton's compiled kernel of a launch."""
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in launch.divisible},
    )
    return triton.compile(source, target=TARGETS[arch], options=dict(launch.options))


def machine_code(launch: Launch, arch: configs.Arch) -> list[str]:
    """The instructions of a compiled launch in their order, as NVIDIA's disassembler writes them; for CUDA."""
    listing = _dump(compile_kernel(launch, arch), "--dump-sass")
    return [
        found[1] for line in listing.splitlines() if (found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(\S.*?)\s*;", line))
    ]


def _dump(compiled: Any, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([_CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout


def _cuda(compiled: Any) -> dict[str, int]:
    out = _dump(compiled, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", out)
    assert found, out
    # A kernel that does not fit the tensor memory compiles to nothing, without an error.
    assert compiled.metadata.tmem_size <= 512, f"{compiled.metadata.tmem_size} columns of tensor memory"
    assert int(found[1]) >= 12, "the compiler gave up"  # `write_pages` takes 14
    return {"registers": int(found[1]), "stack": int(found[2])}


def _hip(compiled: Any) -> dict[str, int]:
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found, name
        return int(found[1])

    stack = field("private_segment_fixed_size") + 4 * field("vgpr_spill_count")
    return {"registers": field("vgpr_count"), "stack": stack}


def compile_share(arch: configs.Arch, index: int, of: int) -> dict[str, dict[str, int]]:
    """What every `of`-th launch from `index` on takes."""
    return {launch.title: compile_launch(launch, arch) for launch in all_launches(arch)[index::of]}


def compile_all(arch: configs.Arch, cache: Path | None = None) -> dict[str, dict[str, int]]:
    """What every launch takes, by title; compiled in two processes.

    Args:
        arch: for which.
        cache: where Triton keeps what it has compiled, so that a second run takes seconds.
    """
    environment = {**os.environ, **({} if cache is None else {"TRITON_CACHE_DIR": str(cache)})}
    environment.pop("TRITON_INTERPRET", None)
    shares = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.gpu.aot", "share", arch, str(i), str(PROCESSES)],
            cwd=Path(__file__).resolve().parents[3],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(PROCESSES)
    ]
    result: dict[str, dict[str, int]] = {}
    try:
        for share in shares:
            out, err = share.communicate()
            if share.returncode:
                raise RuntimeError(f"{arch}: compilation failed:\n{err[-4000:]}")
            result |= json.loads(out.splitlines()[-1])
    finally:
        for share in shares:
            share.kill()
            share.wait()
    return result


def with_slack(measured: dict[str, int]) -> dict[str, int]:
    """A budget: registers may grow to the next multiple of 8 above 4 more; stack and shared memory not at all.

    Instructions of the tensor cores are no upper bound: see `test_aot.py`.
    """
    return {**measured, "registers": (measured["registers"] + 4 + 7) // 8 * 8}


def write_budgets() -> None:
    """Measure everything and write the table: `python -m tests.kernels.gpu.aot`."""
    table = {
        arch: {title: with_slack(measured) for title, measured in sorted(compile_all(arch).items())} for arch in TARGETS
    }
    lines = []
    for arch, rows in table.items():
        body = ",\n".join(f"    {json.dumps(title)}: {json.dumps(budget)}" for title, budget in rows.items())
        lines.append(f"  {json.dumps(arch)}: {{\n{body}\n  }}")
    BUDGETS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["share"]:
        print(json.dumps(compile_share(cast("configs.Arch", sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
    else:
        write_budgets()
